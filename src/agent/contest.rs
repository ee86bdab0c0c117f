//! When to put something back that somebody takes away: at once, unless it is taken away again and again. Two tools that
//! undo each other's work would go on for ever, and every round is a moment without it. Pure: it is told the time.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Times that something is put back within [`WINDOW`].
const TIMES: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);
/// After that, how long it is left alone before each further attempt. One that lasts as long is the end of it.
const REST: Duration = Duration::from_secs(600);

/// What to do about something that was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    PutBack,
    /// Somebody wants it away. `true`: this is news.
    LeaveAlone(bool),
}

#[derive(Debug, Default)]
struct Contest {
    put_back: VecDeque<Instant>,
    /// Until when it is left alone; set when somebody was found to want it away.
    rests_until: Option<Instant>,
}

/// Everything that was taken away of late, by its name.
#[derive(Debug, Default)]
pub struct Contests(BTreeMap<String, Contest>);

impl Contests {
    /// Whether this is left alone for now, and need not be looked at.
    pub fn rests(&self, name: &str, now: Instant) -> bool {
        self.0.get(name).and_then(|contest| contest.rests_until).is_some_and(|until| now < until)
    }

    /// It was found to be gone.
    pub fn gone(&mut self, name: &str, now: Instant) -> Verdict {
        let contest = self.0.entry(name.to_owned()).or_default();
        contest.put_back.retain(|at| now.duration_since(*at) < WINDOW);
        let is_news = contest.rests_until.is_none();
        let may_try = match contest.rests_until {
            Some(until) => now >= until && contest.put_back.is_empty(),
            None => contest.put_back.len() < TIMES,
        };
        if may_try {
            return Verdict::PutBack;
        }
        contest.rests_until = Some(now + REST);
        contest.put_back.clear();
        Verdict::LeaveAlone(is_news)
    }

    /// It was put back. (What could not be put back is nobody's doing.)
    pub fn put_back(&mut self, name: &str, now: Instant) {
        self.0.entry(name.to_owned()).or_default().put_back.push_back(now);
    }

    /// It was found in its place. `true`: who wanted it away has given in.
    pub fn there(&mut self, name: &str, now: Instant) -> bool {
        let Some(contest) = self.0.get(name) else { return false };
        let lasts = contest.put_back.back().is_none_or(|last| now.duration_since(*last) >= WINDOW);
        let was_told = contest.rests_until.is_some();
        if lasts {
            self.0.remove(name);
        }
        lasts && was_told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "connect4";

    /// What is done about it when it is found to be gone.
    fn gone(contests: &mut Contests, now: Instant) -> Verdict {
        let verdict = contests.gone(NAME, now);
        if verdict == Verdict::PutBack {
            contests.put_back(NAME, now);
        }
        verdict
    }

    #[test]
    fn what_is_taken_away_now_and_then_is_always_put_back() {
        let (mut contests, mut now) = (Contests::default(), Instant::now());
        for _ in 0..100 {
            assert_eq!(gone(&mut contests, now), Verdict::PutBack);
            assert!(!contests.there(NAME, now) && !contests.rests(NAME, now));
            now += WINDOW / 4;
        }
        now += WINDOW;
        assert!(!contests.there(NAME, now), "nobody was told of a contest");
        assert!(contests.0.is_empty());
    }

    #[test]
    fn what_cannot_be_put_back_is_tried_for_ever() {
        let (mut contests, now) = (Contests::default(), Instant::now());
        for second in 0..1000 {
            assert_eq!(contests.gone(NAME, now + Duration::from_secs(second)), Verdict::PutBack);
        }
    }

    #[test]
    fn somebody_who_always_takes_it_away_is_told_of_once_and_gets_his_way_but_for_rare_attempts() {
        let (mut contests, start) = (Contests::default(), Instant::now());
        let (mut now, mut verdicts) = (start, Vec::new());
        while now < start + 6 * REST {
            if !contests.rests(NAME, now) {
                verdicts.push(gone(&mut contests, now));
            }
            now += Duration::from_secs(2);
        }
        let count = |wanted| verdicts.iter().filter(|verdict| **verdict == wanted).count();
        assert_eq!(verdicts[..6], [[Verdict::PutBack; 5].as_slice(), &[Verdict::LeaveAlone(true)]].concat());
        assert_eq!((count(Verdict::LeaveAlone(true)), count(Verdict::PutBack)), (1, 10), "{verdicts:?}");
    }

    #[test]
    fn a_contest_is_over_when_an_attempt_lasts_and_others_are_not_touched_by_it() {
        let (mut contests, mut now) = (Contests::default(), Instant::now());
        for _ in 0..6 {
            gone(&mut contests, now);
        }
        assert!(contests.rests(NAME, now) && !contests.rests("connect6", now));
        assert_eq!(contests.gone("connect6", now), Verdict::PutBack);
        now += REST;
        assert!(!contests.rests(NAME, now));
        assert_eq!(gone(&mut contests, now), Verdict::PutBack);
        assert!(!contests.there(NAME, now + Duration::from_secs(2)), "not yet");
        assert!(contests.there(NAME, now + WINDOW));
        assert_eq!(gone(&mut contests, now + WINDOW), Verdict::PutBack, "all is forgotten");
    }
}
