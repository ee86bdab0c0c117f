//! How things are set apart. Without colours by weight alone, so that nothing is said by a colour only.

use ratatui::style::{Color as Ink, Modifier, Style};

use crate::cli::flags::Color;

#[derive(Clone, Copy, Debug)]
pub struct Theme {
    has_colours: bool,
}

impl Theme {
    pub fn new(color: Color) -> Theme {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let has_colours = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
        };
        // crossterm looks at NO_COLOR by itself, and a flag says more than a variable.
        crossterm::style::force_color_output(has_colours);
        Theme { has_colours }
    }

    pub fn head(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// What is less important.
    pub fn soft(self) -> Style {
        self.inked(Ink::DarkGray, Modifier::DIM)
    }

    /// What somebody should look at.
    pub fn bad(self) -> Style {
        self.inked(Ink::Red, Modifier::BOLD)
    }

    fn inked(self, ink: Ink, without: Modifier) -> Style {
        if self.has_colours { Style::new().fg(ink) } else { Style::new().add_modifier(without) }
    }
}
