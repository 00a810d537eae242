//! The binary `tandem`: parses the command line, runs the command, reports errors once and in full.

use std::process::ExitCode;

use clap::Parser;
use trainer::cli::{Arguments, exit_code, explain, reject};
use trainer::watch::ui::fail;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return ExitCode::from(reject(&error)),
    };
    let voice = arguments.voice();
    match arguments.run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = exit_code(&error);
            fail(voice, &explain(&error), code);
            ExitCode::from(code)
        }
    }
}
