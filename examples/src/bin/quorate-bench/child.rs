//! The processes of a measurement: started, pinned to a CPU, told what to do in lines, ended by their own id.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A child and the lines to and from it. Dropping it ends the process.
pub(crate) struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Process {
    /// Starts this program as the child `kind`.
    pub(crate) fn start(kind: &str, args: &[String]) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("child").arg(kind).args(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let to = child.stdin.take().ok_or("no pipe")?;
        let from = BufReader::new(child.stdout.take().ok_or("no pipe")?);
        Ok(Self { child, to, from })
    }

    /// The next line, without the word it must start with.
    pub(crate) fn expect(&mut self, word: &str) -> Result<String, Box<dyn Error>> {
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        match line.trim_end().strip_prefix(word) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(format!("a child said `{}`, `{word}` was expected", line.trim_end()).into()),
        }
    }

    /// Gives an order without waiting for its end.
    pub(crate) fn order(&mut self, order: &str) -> Result<(), Box<dyn Error>> {
        writeln!(self.to, "{order}")?;
        Ok(self.to.flush()?)
    }

    /// Gives an order; the numbers of its answer.
    pub(crate) fn ask(&mut self, order: &str) -> Result<Vec<f64>, Box<dyn Error>> {
        self.order(order)?;
        self.answer()
    }

    /// The numbers of the answer to an order that was given.
    pub(crate) fn answer(&mut self) -> Result<Vec<f64>, Box<dyn Error>> {
        let answer = self.expect("ok")?;
        answer.split_whitespace().map(|w| w.parse().map_err(|e| format!("`{w}`: {e}").into())).collect()
    }

    /// As a crash of the machine would, for everybody but the kernel.
    pub(crate) fn kill(&mut self) -> Result<(), Box<dyn Error>> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pins this process, and the threads it starts from now on, to a CPU; `-` leaves it free.
pub(crate) fn pin(cpu: &str) -> Result<(), Box<dyn Error>> {
    if cpu != "-" {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu.parse()?);
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    Ok(())
}

/// Answers the parent.
pub(crate) fn say(line: &str) {
    println!("{line}");
    let _ = std::io::stdout().flush();
}
