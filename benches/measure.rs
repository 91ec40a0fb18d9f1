//! What `benches/run.py` runs inside a test machine: measures commands and system calls, alternating between them.
//!
//! `measure ROUNDS [reconfigure DIRECTORY | run COMMAND ARGUMENT…] [, …]` carries the jobs out in turn, ROUNDS times, and prints
//! the microseconds of each, a line a job. Alternating, because what else the machine does then hits all jobs alike.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use layered_stores_overlay::refresh::reconfigure;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((rounds, jobs)) = arguments.split_first() else { return };
    // cargo runs benches with `--bench`; there is nothing to measure outside a test machine.
    let Ok(rounds) = rounds.parse::<u32>() else { return };
    let jobs: Vec<&[String]> = jobs.split(|argument| argument == ",").collect();
    let mut times = vec![Vec::new(); jobs.len()];
    for _ in 0..rounds {
        for (job, times) in jobs.iter().zip(&mut times) {
            let start = Instant::now();
            carry_out(job);
            times.push(start.elapsed().as_micros().to_string());
        }
    }
    for times in times {
        println!("{}", times.join(" "));
    }
}

fn carry_out(job: &[String]) {
    match job {
        [kind, directory] if kind == "reconfigure" => reconfigure(directory).expect("an overlay mount"),
        [kind, program, arguments @ ..] if kind == "run" => {
            let mut command = Command::new(program);
            let status = command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).status();
            assert!(status.is_ok_and(|status| status.success()), "{program} failed");
        }
        other => panic!("not a job: {other:?}"),
    }
}
