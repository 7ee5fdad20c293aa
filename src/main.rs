//! The program `hostdir`; all of its code is in the library.

use std::process::ExitCode;

use clap::Parser;
use hostdir::config::Cli;

fn main() -> ExitCode {
    match hostdir::run::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hostdir: {error:#}");
            ExitCode::FAILURE
        }
    }
}
