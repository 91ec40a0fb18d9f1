//! Other programs that say something.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

/// What a program has printed by its end, or in so much time if it takes longer; `None`: it cannot be run.
pub(super) fn said_by(program: &str, arguments: &[&str], patience: Duration) -> Option<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let from = child.stdout.take();
    let (sender, text) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = from.map(|mut from| from.read_to_end(&mut text));
        let _ = sender.send(text);
    });
    let began = Instant::now();
    let text = text.recv_timeout(patience).unwrap_or_default();
    // One that hangs is left behind.
    let _ = child.kill();
    if began.elapsed() < patience {
        let _ = child.wait();
    }
    Some(String::from_utf8_lossy(&text).into_owned())
}
