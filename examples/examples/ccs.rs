//! The configuration document alone: read, checked with line and column, compared.
//!
//! `cargo run --example ccs` prints what a document configures, an error, and a difference.

use std::error::Error;

const OLD: &str = r#"name = "example"

[[node]]
id = 1
name = "alpha"
address = "10.0.0.1:7411"

[[export]]
name = "disk"
server = "disks"
address = "10.0.0.9:10809"

[[volume_group]]
name = "vg0"
devices = ["disk"]

[[filesystem]]
name = "data"
volume = "vg0/data"
journals = 3
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let document = quorate_ccs::parse(OLD)?;
    println!(
        "{}: {} node, {} filesystem",
        document.name.get_ref(),
        document.nodes.len(),
        document.filesystems.len()
    );
    let wrong = OLD.replace("vg0/data", "vg1/data");
    if let Err(error) = quorate_ccs::parse(&wrong) {
        println!("cluster.toml:{error}");
    }
    let new = OLD.replace("journals = 3", "journals = 5");
    quorate_ccs::parse(&new)?;
    print!("{}", quorate_ccs::diff(OLD, &new));
    Ok(())
}
