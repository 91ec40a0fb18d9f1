//! `layered-stores doctor`: is the machine as layered stores need it?
//!
//! What the machine says is gathered first, as it is ([`facts`]). What it means is said by functions of that alone ([`checks`]).

mod checks;
mod facts;

use std::{fmt::Write as _, process::ExitCode};

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use checks::{Finding, Verdict};
use facts::Facts;

use super::{
    args::PROBLEMS,
    output::{print, print_json, wrapped},
};

/// Looks at the machine and says what is wrong, with the way out.
pub(super) async fn doctor(json: bool) -> Result<ExitCode> {
    let findings = checks::all(&Facts::gather().await);
    if json {
        print_json(&findings)?;
    } else {
        print(&findings.iter().map(line).collect::<String>())?;
    }
    let is_wrong = findings.iter().any(|finding| finding.verdict == Verdict::Wrong);
    Ok(if is_wrong { ExitCode::from(PROBLEMS) } else { ExitCode::SUCCESS })
}

fn line(finding: &Finding) -> String {
    let style = match finding.verdict {
        Verdict::Right => AnsiColor::Green.on_default().bold(),
        Verdict::Note => AnsiColor::Yellow.on_default().bold(),
        Verdict::Wrong => AnsiColor::Red.on_default().bold(),
        Verdict::Unknown => Style::new().dimmed(),
    };
    let cure = if finding.cure.is_empty() { String::new() } else { format!("; {}", finding.cure) };
    let what = wrapped(&format!("{}{cure}", finding.message), 24, std::io::stdout());
    let mut line = String::new();
    let _ = writeln!(line, "{style}{:<7}{style:#}  {:<13}  {what}", finding.verdict.to_string(), finding.check);
    line
}
