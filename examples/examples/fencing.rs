//! A fence agent of the FenceAgentAPI, called as the coordinator calls it.
//!
//! `cargo run --example fencing` writes a small agent to a temporary directory and turns "off" what it stands for.

use quorate_fencing::driver::ProgramAgent;
use quorate_fencing::{Action, FenceAgent, FenceDevice, Step};
use std::collections::BTreeMap;
use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// Keeps the state of one socket in a file: options on standard input, exit codes as the interface says.
const AGENT: &str = r#"#!/bin/sh
while read -r line; do case $line in action=*) action=${line#action=} ;; state=*) state=${line#state=} ;; esac; done
case $action in
off|on) echo "$action" > "$state" ;;
status) [ "$(cat "$state")" = on ] && exit 0 || exit 2 ;;
*) exit 1 ;;
esac
"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::temp_dir().join(format!("quorate-fencing-example-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let (program, state) = (dir.join("fence_file"), dir.join("socket"));
    std::fs::write(&program, AGENT)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    std::fs::write(&state, "on\n")?;

    let device = FenceDevice {
        agent: program.display().to_string(),
        options: BTreeMap::from([("state".to_owned(), state.display().to_string())]),
        timeout: Duration::from_secs(5),
    };
    let step = Step { device: "socket".into(), action: Action::Off, options: BTreeMap::new() };
    let outcome = ProgramAgent::new().run(&device, &step, "alpha").await;
    println!("off: {outcome:?}, the socket says {}", std::fs::read_to_string(&state)?.trim());
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
