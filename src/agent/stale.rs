//! Connected sockets that do not go where their Service is, beside the agent: a pass walks every translated socket of the
//! node, and must not keep the next change waiting.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::bpf::StalePass;

/// Before a pass that failed is made again; doubled each time.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LONGEST: Duration = Duration::from_secs(300);

/// One pass; blocks. Looks for sockets that were connected to Services that nobody served, too, if told so.
pub type Pass = Arc<dyn Fn(bool) -> anyhow::Result<StalePass> + Send + Sync>;

/// At most one pass runs and one more waits: a pass that has not begun sees every backend that went before it.
pub struct StaleSocketPasses {
    /// `None`: the kernel cannot.
    pass: Option<Pass>,
    running: Option<JoinHandle<anyhow::Result<StalePass>>>,
    again: bool,
    /// Whether the running pass, and the next one, look for sockets of Services that nobody served.
    unserved: [bool; 2],
    /// Passes that failed in a row, and when the next one begins.
    failures: u32,
    retry: Option<Instant>,
    /// Namespaces that are not searched are told of once.
    told: bool,
}

impl StaleSocketPasses {
    pub fn new(pass: Option<Pass>) -> Self {
        StaleSocketPasses {
            pass,
            running: None,
            again: false,
            unserved: [false; 2],
            failures: 0,
            retry: None,
            told: false,
        }
    }

    /// Backends went, or (`unserved`) a UDP Service got its first: have a pass begin after now.
    pub fn request(&mut self, unserved: bool) {
        self.unserved[1] |= unserved;
        let Some(pass) = &self.pass else { return };
        // It does what a pass that failed would do again.
        self.retry = None;
        if self.running.is_some() {
            self.again = true;
            return;
        }
        let pass = Arc::clone(pass);
        self.unserved = [self.unserved[1], false];
        let unserved = self.unserved[0];
        self.running = Some(tokio::task::spawn_blocking(move || pass(unserved)));
    }

    /// Waits for the running pass, says what it did, and begins the one that waits; a pass that failed is made again. Never
    /// returns while none runs.
    pub async fn finished(&mut self) {
        if let (None, Some(at)) = (&self.running, self.retry) {
            sleep_until(at).await;
            self.retry = None;
            self.request(false);
        }
        let Some(running) = &mut self.running else { return std::future::pending().await };
        let result = running.await.context("searching for sockets of removed backends failed").flatten();
        self.running = None;
        let is_whole = match result {
            Ok(pass) => {
                self.report(pass);
                pass.failed == 0
            }
            Err(error) => {
                tracing::warn!("cannot destroy sockets of removed backends: {error:#}; trying again");
                false
            }
        };
        self.unserved[1] |= self.unserved[0] && !is_whole;
        self.failures = if is_whole { 0 } else { self.failures + 1 };
        self.retry = (!is_whole).then(|| {
            let pause = RETRY.saturating_mul(1 << (self.failures - 1).min(16)).min(RETRY_LONGEST);
            Instant::now() + pause
        });
        if std::mem::take(&mut self.again) {
            self.request(false);
        }
    }

    fn report(&mut self, pass: StalePass) {
        const REMEDY: &str =
            "run in the host's PID namespace with CAP_SYS_ADMIN and CAP_SYS_PTRACE, or mount the host's /run/netns";
        let StalePass { found, reconnected, destroyed, failed, unreachable, hidden } = pass;
        if failed > 0 {
            tracing::warn!(
                found,
                destroyed,
                failed,
                "some sockets of removed backends could not be destroyed; trying again"
            );
        }
        if unreachable > 0 {
            tracing::warn!(
                found,
                destroyed,
                unreachable,
                "some sockets of removed backends are in network namespaces that cannot be found or entered: {REMEDY}"
            );
        } else if found > 0 {
            tracing::info!(
                found,
                reconnected,
                destroyed,
                "UDP sockets without a backend were reconnected, or sockets destroyed"
            );
        }
        if hidden > 0 && !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                hidden,
                "sockets of removed backends may be in network namespaces that cannot be inspected: {REMEDY}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn requests_during_a_pass_become_one_more_pass() {
        let (release, gate) = mpsc::channel::<()>();
        let gate = Mutex::new(gate);
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let mut passes = StaleSocketPasses::new(Some(Arc::new(move |_| {
            gate.lock().unwrap().recv_timeout(Duration::from_secs(10))?;
            count.fetch_add(1, SeqCst);
            Ok(StalePass::default())
        })));
        for _ in 0..5 {
            passes.request(false);
        }
        release.send(()).unwrap();
        release.send(()).unwrap();
        passes.finished().await;
        passes.finished().await;
        assert_eq!(ran.load(SeqCst), 2);
        assert!(timeout(Duration::from_millis(50), passes.finished()).await.is_err(), "a third pass ran");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_that_failed_is_made_again_until_it_does_not() {
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let mut passes = StaleSocketPasses::new(Some(Arc::new(move |_| match count.fetch_add(1, SeqCst) {
            0 => anyhow::bail!("no iterator"),
            1 | 2 => Ok(StalePass { found: 2, destroyed: 1, failed: 1, ..StalePass::default() }),
            _ => Ok(StalePass { found: 1, destroyed: 1, ..StalePass::default() }),
        })));
        passes.request(false);
        let began = Instant::now();
        for _ in 0..4 {
            passes.finished().await;
        }
        assert_eq!((ran.load(SeqCst), began.elapsed().as_secs()), (4, 1 + 2 + 4));
        assert!(timeout(Duration::from_secs(3600), passes.finished()).await.is_err(), "a fifth pass ran");
    }

    #[tokio::test]
    async fn a_pass_that_fails_or_panics_does_not_stop_the_next() {
        let ran = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&ran);
        let mut passes = StaleSocketPasses::new(Some(Arc::new(move |_| match count.fetch_add(1, SeqCst) {
            0 => anyhow::bail!("no iterator"),
            1 => panic!("a test's panic"),
            _ => Ok(StalePass::default()),
        })));
        for _ in 0..3 {
            passes.request(false);
            passes.finished().await;
        }
        assert_eq!(ran.load(SeqCst), 3);
    }
}
