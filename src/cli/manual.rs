//! Completions and manual pages, made of the definitions of the flags.

use std::path::Path;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;
use clap_complete::{Shell as Kind, generate};
use clap_mangen::Man;

use super::UsageError;
use super::flags::{Cli, ManFlags, Shell};

/// Prints a shell's completions.
///
/// # Errors
/// When standard output cannot be written to.
pub fn completion(shell: Shell) -> Result<()> {
    let kind = match shell {
        Shell::Bash => Kind::Bash,
        Shell::Zsh => Kind::Zsh,
        Shell::Fish => Kind::Fish,
    };
    let mut script = Vec::new();
    generate(kind, &mut Cli::command(), "kubelane", &mut script);
    print(script)
}

/// Prints a page, or writes all.
///
/// # Errors
/// A [`UsageError`] for a subcommand that there is not; when a page cannot be written.
pub fn man(flags: &ManFlags) -> Result<()> {
    let mut all = Cli::command();
    all.build();
    if let Some(directory) = &flags.directory {
        return write_all(&all, directory);
    }
    let command = match &flags.command {
        None => &all,
        Some(name) => {
            let found = all.find_subcommand(name);
            found.ok_or_else(|| UsageError(format!("unknown subcommand {name:?}: see `kubelane --help`")))?
        }
    };
    print(page(command)?)
}

fn write_all(all: &clap::Command, directory: &Path) -> Result<()> {
    let shown = all.get_subcommands().filter(|command| command.get_name() != "help");
    for command in std::iter::once(all).chain(shown) {
        let path = directory.join(format!("{}.8", title(command)));
        std::fs::write(&path, page(command)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Of the page: "kubelane-explain".
fn title(command: &clap::Command) -> String {
    command.get_display_name().unwrap_or("kubelane").to_owned()
}

fn page(command: &clap::Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    let source = concat!("kubelane ", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).title(title(command)).section("8").source(source).manual("kubelane");
    man.render(&mut page).context("rendering a manual page")?;
    Ok(page)
}

fn print(text: Vec<u8>) -> Result<()> {
    super::print(&String::from_utf8(text).context("the output is not UTF-8")?)
}
