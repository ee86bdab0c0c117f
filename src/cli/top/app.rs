//! What is shown, and what keys do to it.

use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::look::{Seen, ServiceName};
use crate::cli::explain::Explanation;
use crate::overview::{Order, Overview, Row};

/// Characters of a filter.
const FILTER_MAX: usize = 300;

/// The state of the page.
#[derive(Debug, Default)]
pub struct App {
    pub overview: Option<Overview>,
    /// Why the last look saw nothing, or the daemon did not answer.
    pub trouble: Option<String>,
    /// The Service that is opened, and what was told of it.
    pub service: Option<ServiceName>,
    pub detail: Option<Result<Explanation, String>>,
    pub order: Order,
    pub filter: String,
    /// A filter is being written.
    pub is_typing: bool,
    pub is_paused: bool,
    /// The id of the Service port that the cursor is on, which may move; and where it was last.
    selected: Option<u32>,
    pub cursor: usize,
    /// The first line of a Service that is shown.
    pub scroll: usize,
    /// Lines of the list, as it was last drawn.
    pub page: usize,
}

/// What an event calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Draw,
    /// At once.
    Look,
    Quit,
}

impl App {
    /// A look came back.
    pub fn saw(&mut self, seen: Seen) {
        self.trouble = seen.daemon_trouble;
        match seen.overview {
            Ok(overview) => self.overview = Some(overview),
            Err(error) => self.trouble = Some(error),
        }
        if let Some((_, told)) = seen.detail.filter(|(service, _)| self.service.as_ref() == Some(service)) {
            self.detail = Some(told);
        }
    }

    /// The Service ports that the filter lets through, with the cursor on the one that it was on before.
    pub fn rows<'a>(&mut self, overview: &'a Overview) -> Vec<Row<'a>> {
        let rows = overview.rows(&self.filter, self.order);
        let known = self.selected.and_then(|id| rows.iter().position(|row| row.port.id == id));
        self.cursor = known.unwrap_or(self.cursor).min(rows.len().saturating_sub(1));
        self.selected = rows.get(self.cursor).map(|row| row.port.id);
        rows
    }

    pub fn act(&mut self, event: &Event) -> Next {
        match event {
            Event::Key(key) if key.kind != KeyEventKind::Release => self.press(*key),
            _ => Next::Draw,
        }
    }

    fn press(&mut self, key: KeyEvent) -> Next {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        let is_no_text = is_control || key.modifiers.contains(KeyModifiers::ALT);
        match key.code {
            KeyCode::Char('c' | 'd') if is_control => Next::Quit,
            KeyCode::Char(_) if is_no_text => Next::Draw,
            code if self.is_typing => self.write(code),
            KeyCode::Char('q') => Next::Quit,
            KeyCode::Char('p' | ' ') => {
                self.is_paused = !self.is_paused;
                Next::Look
            }
            code if self.service.is_some() => self.press_in_service(code),
            code => self.press_in_list(code),
        }
    }

    fn write(&mut self, code: KeyCode) -> Next {
        match code {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(c) if self.filter.chars().count() < FILTER_MAX => self.filter.push(c),
            _ => {}
        }
        Next::Draw
    }

    fn press_in_service(&mut self, code: KeyCode) -> Next {
        match code {
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Left | KeyCode::Enter => {
                (self.service, self.detail, self.scroll) = (None, None, 0);
            }
            code => self.scroll = moved(self.scroll, usize::MAX, self.page, code),
        }
        Next::Draw
    }

    fn press_in_list(&mut self, code: KeyCode) -> Next {
        match code {
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('s') => {
                self.order = match self.order {
                    Order::Name => Order::New,
                    Order::New => Order::Open,
                    Order::Open => Order::Name,
                };
            }
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Enter | KeyCode::Right => return self.open(),
            code => {
                let Some(overview) = self.overview.take() else { return Next::Draw };
                let rows = self.rows(&overview);
                self.cursor = moved(self.cursor, rows.len().saturating_sub(1), self.page, code);
                self.selected = rows.get(self.cursor).map(|row| row.port.id);
                drop(rows);
                self.overview = Some(overview);
            }
        }
        Next::Draw
    }

    /// Opens the Service under the cursor.
    fn open(&mut self) -> Next {
        let Some(overview) = self.overview.take() else { return Next::Draw };
        let rows = self.rows(&overview);
        let name = rows.get(self.cursor).map(|row| (row.port.name.namespace.clone(), row.port.name.name.clone()));
        drop(rows);
        self.overview = Some(overview);
        (self.service, self.detail, self.scroll) = (name, None, 0);
        // Whoever opens a Service wants to see it.
        self.is_paused = false;
        Next::Look
    }
}

/// A place in a list after a key. `page`: its visible lines.
fn moved(at: usize, last: usize, page: usize, code: KeyCode) -> usize {
    let page = page.max(1);
    match code {
        KeyCode::Up | KeyCode::Char('k') => at.saturating_sub(1),
        KeyCode::Down | KeyCode::Char('j') => at.saturating_add(1).min(last),
        KeyCode::PageUp => at.saturating_sub(page),
        KeyCode::PageDown => at.saturating_add(page).min(last),
        KeyCode::Home | KeyCode::Char('g') => 0,
        KeyCode::End | KeyCode::Char('G') => last,
        _ => at,
    }
}
