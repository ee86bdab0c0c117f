//! `kubelane monitor`: what happens in the datapath, as it happens, one line an event. The programs tell whoever has a place
//! among those who listen (`bpf::Listening`), and nobody when there is none.

mod begun;
mod expression;
mod filter;
mod flags;
mod history;
mod kind;
mod names;
mod print;
mod record;

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::time::{ClockId, clock_gettime};

pub use flags::MonitorFlags;

use crate::bpf::{Listening, Tally};
use begun::Begun;
use filter::Filter;
use history::{History, LOOK_EVERY, Last, Line};
pub use names::Names;
use print::{Gap, Printer, words};
pub use print::{compact, name};
pub use record::{Record, shown};

/// Events that are read before they are written.
const AT_ONCE: usize = 4096;
/// The longest that an event waits, unless many do; in milliseconds.
const PAUSE_MS: u8 = 20;
/// From one look for what was lost, and word that somebody listens, to the next.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// Runs the subcommand.
///
/// # Errors
/// A [`UsageError`](super::UsageError) for filters that cannot be meant; when nothing is pinned there, a right is missing or
/// the kernel cannot listen; when the file to be read is none.
pub fn run(flags: &MonitorFlags) -> Result<()> {
    let filter = flags.filter()?;
    match &flags.input {
        Some(path) => read(path, flags, &filter),
        None => listen(flags, &filter),
    }
}

/// Whether to go on: not when as many events as were asked for have been shown, or nobody reads any more.
struct Shown {
    printer: Printer<io::StdoutLock<'static>>,
    left: Option<u64>,
    shown: u64,
}

impl Shown {
    fn new(flags: &MonitorFlags) -> Shown {
        Shown { printer: Printer::new(io::stdout().lock(), flags.output), left: flags.count, shown: 0 }
    }

    fn event(&mut self, record: &Record) -> Result<()> {
        if self.left == Some(0) {
            return Ok(());
        }
        self.left = self.left.map(|left| left - 1);
        self.shown += 1;
        self.printer.event(record)
    }

    fn gap(&mut self, gap: Gap) -> Result<()> {
        if gap.is_empty() { Ok(()) } else { self.printer.gap(gap) }
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        match line {
            Line::Event(record) => self.event(record),
            Line::Gap(gap) => self.gap(*gap),
        }
    }

    fn is_done(&self) -> bool {
        self.left == Some(0) || self.printer.is_closed()
    }
}

/// Of a file.
fn read(path: &Path, flags: &MonitorFlags, filter: &Filter) -> Result<()> {
    let (mut history, mut last, mut shown) = (History::open(path)?, Last::new(flags.last), Shown::new(flags));
    let is_wanted = |line: &Line| match line {
        Line::Event(record) => filter.takes(record) && flags.since.is_none_or(|since| since.takes(record)),
        Line::Gap(_) => true,
    };
    let signals = hold_signals()?;
    while !shown.is_done() {
        match history.next()? {
            Some(line) => {
                let line = Some(line).filter(is_wanted).and_then(|line| last.put(line));
                line.map_or(Ok(()), |line| shown.line(&line))?;
            }
            None => {
                last.finish().try_for_each(|line| shown.line(&line))?;
                shown.printer.flush()?;
                if !flags.follow || is_over(&signals, None, PollTimeout::ZERO)? {
                    break;
                }
                sleep(LOOK_EVERY);
            }
        }
    }
    shown.printer.flush()
}

/// Of now.
fn listen(flags: &MonitorFlags, filter: &Filter) -> Result<()> {
    let pin_path = &flags.pins.pin_path;
    let signals = hold_signals()?;
    let mut listening = Listening::open(pin_path, filter.wanted(flags.sample, flags.rate))?;
    let mut session = Session {
        names: Names::open(pin_path)?,
        begun: Begun::default(),
        filter,
        shown: Shown::new(flags),
        told: Tally::default(),
        monotonic_zero: monotonic_zero()?,
    };
    eprintln!("listening to {}", pin_path.display());
    let (mut looked, mut is_ending) = (None::<Instant>, false);
    loop {
        if looked.is_none_or(|looked| looked.elapsed() >= LOOK_AROUND) {
            looked = Some(Instant::now());
            listening.hold().context("the state that was listened to has gone")?;
            session.monotonic_zero = monotonic_zero()?;
            session.tell_gaps(&listening)?;
        }
        let read = session.show(&mut listening)?;
        if session.shown.is_done() || (is_ending && read == 0) {
            break;
        }
        if read == 0 {
            is_ending = is_over(&signals, Some(&listening), PAUSE_MS.into())?;
        } else {
            is_ending |= is_over(&signals, None, PollTimeout::ZERO)?;
        }
    }
    session.finish(&listening)
}

/// Events on their way from the kernel to standard output.
struct Session<'a> {
    names: Names,
    begun: Begun,
    filter: &'a Filter,
    shown: Shown,
    /// What has been said so far.
    told: Tally,
    monotonic_zero: i128,
}

impl Session<'_> {
    /// How many events were read.
    fn show(&mut self, listening: &mut Listening) -> Result<usize> {
        self.names.refresh();
        let events = listening.read(AT_ONCE)?;
        for event in &events {
            let begun_ns = self.begun.note(event);
            let record = Record::new(event, &mut self.names, self.monotonic_zero, begun_ns);
            if let Some(record) = record.filter(|record| self.filter.takes(record)) {
                self.shown.event(&record)?;
            }
        }
        self.shown.printer.flush()?;
        Ok(events.len())
    }

    fn tell_gaps(&mut self, listening: &Listening) -> Result<()> {
        let tally = listening.tally()?;
        let gap = Gap { lost: tally.lost - self.told.lost, limited: tally.limited - self.told.limited };
        self.told = tally;
        self.shown.gap(gap)
    }

    fn finish(mut self, listening: &Listening) -> Result<()> {
        self.tell_gaps(listening)?;
        self.shown.printer.flush()?;
        let Tally { told, lost, limited, sampled } = self.told;
        let gap = words(Gap { lost, limited });
        let gap = if gap.is_empty() { "none lost".to_owned() } else { gap };
        let sampled = if sampled == 0 { String::new() } else { format!("; {sampled} left out by --sample") };
        eprintln!("{} events shown of {told} told; {gap}{sampled}", self.shown.shown);
        Ok(())
    }
}

/// SIGINT and SIGTERM wait to be read, so that what was lost is still told.
fn hold_signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM].into_iter().for_each(|signal| signals.add(signal));
    signals.thread_block().context("cannot hold back signals")?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("cannot wait for signals")
}

/// Waits until much is to be read, or for so long; true when somebody wants an end, or nobody reads standard output.
fn is_over(signals: &SignalFd, listening: Option<&Listening>, patience: PollTimeout) -> Result<bool> {
    let stdout = io::stdout();
    let mut waited_for =
        vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(stdout.as_fd(), PollFlags::empty())];
    waited_for.extend(listening.map(|listening| PollFd::new(listening.ring(), PollFlags::POLLIN)));
    match poll(&mut waited_for, patience) {
        Err(nix::errno::Errno::EINTR) => return Ok(false),
        result => result.context("waiting for events")?,
    };
    let has = |n: usize, flags: PollFlags| waited_for[n].revents().is_some_and(|found| found.intersects(flags));
    Ok(has(0, PollFlags::POLLIN) || has(1, PollFlags::POLLERR | PollFlags::POLLHUP))
}

/// Nanoseconds since 1970 at which CLOCK_MONOTONIC was 0, as the clock is set now.
///
/// # Errors
/// When the clock cannot be read.
pub fn monotonic_zero() -> Result<i128> {
    let now = |clock| -> Result<i128> {
        let time = clock_gettime(clock).context("cannot read the clock")?;
        Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
    };
    Ok(now(ClockId::CLOCK_REALTIME)? - now(ClockId::CLOCK_MONOTONIC)?)
}
