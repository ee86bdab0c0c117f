//! The kubelane binary: see `kubelane --help`.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    kubelane::cli::main(Instant::now())
}
