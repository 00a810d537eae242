//! `tandem completions`.

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use super::Arguments;
use crate::watch::ui::Ui;

/// Print a script that completes commands, options and their values in a shell.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Completions {
    /// The shell.
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  tandem completions bash > ~/.local/share/bash-completion/completions/tandem
  tandem completions zsh > ~/.zfunc/_tandem     # a folder of $fpath
  tandem completions fish > ~/.config/fish/completions/tandem.fish";

impl Completions {
    /// Prints the script.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let mut script = Vec::new();
        generate(self.shell, &mut Arguments::command(), "tandem", &mut script);
        let script = String::from_utf8(script)?;
        ui.tell(script.trim_end(), &serde_json::json!({ "shell": self.shell.to_string(), "script": script }));
        Ok(0)
    }
}
