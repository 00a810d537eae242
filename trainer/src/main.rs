//! The binary `tandem`: parses the command line, runs the command, tells errors once and in full.

use std::process::ExitCode;

use clap::Parser;
use trainer::cli::{Arguments, exit_code, explain};
use trainer::ui::complain;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&format!("error: {}", explain(&error)));
            ExitCode::from(exit_code(&error))
        }
    }
}
