//! `kubelane top`: a terminal page of what goes on on this node. It is told what `kubelane get`, `explain` and /metrics
//! have, as often as it is asked for, and asks for nothing while it is paused.

mod app;
mod detail;
mod draw;
mod look;
mod theme;

use std::io::{self, IsTerminal as _};
use std::mem::ManuallyDrop;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use crossterm::event;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::DefaultTerminal;
use signal_hook::consts::SIGTERM;

use super::flags::TopFlags;
use crate::overview::Reader;
use app::{App, Next};
use look::Looker;
use theme::Theme;

/// Between two looks for a signal, and, while an answer is waited for, for that.
const IDLE: Duration = Duration::from_millis(500);
const EAGER: Duration = Duration::from_millis(20);

/// Runs the subcommand until somebody quits, the terminal goes, or a signal comes.
///
/// # Errors
/// When there is no terminal, nothing of this version is pinned there, or the maps cannot be read.
pub fn run(flags: &TopFlags) -> Result<()> {
    let pin_path = &flags.pins.pin_path;
    ensure!(
        io::stdout().is_terminal() && io::stdin().is_terminal(),
        "standard input and output are no terminal: for programs there are `kubelane get services`, `kubelane get node` \
         and /metrics"
    );
    // What is wrong with the state is said where it stays to be read.
    Reader::new(pin_path).look(None)?;
    let ended = Arc::new(AtomicBool::new(false));
    // SIGHUP is left as it is: there is no terminal any more to be put in order.
    signal_hook::flag::register(SIGTERM, Arc::clone(&ended)).context("listening for signals")?;
    let theme = Theme::new(flags.color);
    let looker = Looker::start(pin_path)?;
    let mut screen = Screen::open()?;
    follow(&mut screen.0, &theme, looker, Duration::from_secs(flags.interval.into()), &ended)
}

/// The terminal, as it was before once this is dropped. ratatui's own drop would say on standard error that a terminal has
/// gone, which may be that terminal: the message would be a panic.
struct Screen(ManuallyDrop<DefaultTerminal>);

impl Screen {
    fn open() -> Result<Screen> {
        Ok(Screen(ManuallyDrop::new(ratatui::try_init().context("taking over the terminal")?)))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

fn follow(
    terminal: &mut DefaultTerminal,
    theme: &Theme,
    mut looker: Looker,
    every: Duration,
    ended: &AtomicBool,
) -> Result<()> {
    let mut app = App::default();
    let mut due = Instant::now();
    let mut is_stale = true;
    while !ended.load(Relaxed) {
        if !app.is_paused && !looker.is_asked() && Instant::now() >= due {
            looker.ask(app.service.clone())?;
            due = Instant::now() + every;
        }
        if let Some(seen) = looker.answer()? {
            app.saw(seen);
            is_stale = true;
        }
        if std::mem::take(&mut is_stale) {
            terminal.draw(|frame| draw::draw(frame, &mut app, theme)).context("writing to the terminal")?;
        }
        let wait = match (looker.is_asked(), app.is_paused) {
            (true, _) => EAGER,
            (false, true) => IDLE,
            (false, false) => due.saturating_duration_since(Instant::now()).min(IDLE),
        };
        wait_for_keys(wait)?;
        while event::poll(Duration::ZERO).context("reading from the terminal")? {
            match app.act(&event::read().context("reading from the terminal")?) {
                Next::Quit => return Ok(()),
                Next::Look => due = Instant::now(),
                Next::Draw => {}
            }
            is_stale = true;
        }
    }
    Ok(())
}

/// Returns when there may be an event: a key, or a signal, which a change of size is. crossterm itself would read from a
/// terminal that has gone without end.
///
/// # Errors
/// When the terminal has gone.
fn wait_for_keys(wait: Duration) -> Result<()> {
    let stdin = io::stdin();
    let mut asked = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    match poll(&mut asked, PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("reading from the terminal"),
    }
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    ensure!(!asked[0].revents().is_some_and(|flags| flags.intersects(gone)), "the terminal has gone");
    Ok(())
}
