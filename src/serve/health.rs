//! What the daemon says about itself, as a pure function of a few facts and the time.
//!
//! Facts come from the agent; the answers follow kube-proxy's (`pkg/proxy/healthcheck/proxy_health.go`): a proxy is
//! healthy unless an update has been waiting for too long, and a node that is about to go asks for no new traffic.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use tokio::sync::watch;

use super::probes::Probed;

/// kube-proxy's default `--iptables-sync-period` and `--nftables-sync-period`.
const SYNC_PERIOD: Duration = Duration::from_secs(30);
/// An update that has been waiting for longer than this makes the daemon unhealthy.
pub const UPDATE_TIMEOUT: Duration = SYNC_PERIOD.saturating_mul(2);

/// The daemon's health, shared by the agent (which writes) and the servers (which read).
pub struct Health {
    facts: Mutex<Facts>,
    stage: watch::Sender<Stage>,
    probed: watch::Sender<Probed>,
}

/// How far the daemon has come. It never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Starting,
    /// A sync has left nothing waiting.
    Synced,
    /// And a connection has gone through the datapath, or could not be made to.
    Ready,
}

/// The datapath's trial: a connection that the daemon sends through it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Trial {
    /// Why it has not been passed.
    Open(String),
    /// With what people should know of it.
    Done(Option<String>),
}

/// What is known.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Facts {
    /// The kernel's maps hold a state: from a former daemon, or from the first sync on.
    pub programmed: bool,
    /// `None` once a sync has left nothing waiting; until then why not.
    pub not_ready: Option<String>,
    pub trial: Trial,
    /// When the oldest update that is not in the kernel came.
    pub waiting_since: Option<Instant>,
    /// When the kernel's maps last became up to date.
    pub last_updated: Option<SystemTime>,
    /// The own Node goes away (deletion timestamp or the autoscaler's taint).
    pub node_leaves: bool,
    /// What is not served on this node, and why.
    pub unserved: Option<String>,
}

/// An HTTP answer.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub ok: bool,
    pub body: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    /// RFC 3339; null before the first update.
    last_updated: Option<String>,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Default for Health {
    fn default() -> Self {
        let facts = Facts {
            programmed: false,
            not_ready: Some("starting".to_owned()),
            trial: Trial::Open("the datapath has not been probed yet".to_owned()),
            waiting_since: None,
            last_updated: None,
            node_leaves: false,
            unserved: None,
        };
        Health {
            facts: Mutex::new(facts),
            stage: watch::Sender::new(Stage::Starting),
            probed: watch::Sender::default(),
        }
    }
}

impl Health {
    /// A former daemon's state was found in the kernel, and serves.
    pub fn state_adopted(&self) {
        self.lock().programmed = true;
    }

    /// Why `/readyz` says no. Without effect once the daemon is ready.
    pub fn not_ready(&self, reason: &str) {
        let mut facts = self.lock();
        if facts.not_ready.as_deref().is_some_and(|known| known != reason) {
            facts.not_ready = Some(reason.to_owned());
        }
    }

    /// An update came, or a sync left some behind. The oldest one counts.
    pub fn update_waits(&self, now: Instant) {
        self.lock().waiting_since.get_or_insert(now);
    }

    /// A sync left nothing waiting.
    pub fn up_to_date(&self, now: SystemTime) {
        let mut facts = self.lock();
        facts.programmed = true;
        facts.not_ready = None;
        facts.waiting_since = None;
        facts.last_updated = Some(now);
        drop(facts);
        self.come_to(Stage::Synced);
    }

    /// The datapath passed its trial, or cannot be tried: `remark` says why. Comes after the first sync.
    pub fn probed(&self, remark: Option<&str>) {
        self.lock().trial = Trial::Done(remark.map(str::to_owned));
        self.come_to(Stage::Ready);
    }

    /// The datapath failed its trial.
    pub fn probe_failed(&self, reason: &str) {
        self.lock().trial = Trial::Open(reason.to_owned());
    }

    /// How far the daemon has come, from now on.
    pub fn stage(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// The ports at which servers of this daemon answer, from now on.
    pub fn probed_ports(&self) -> watch::Receiver<Probed> {
        self.probed.subscribe()
    }

    pub(super) fn change_probed(&self, change: impl FnOnce(&mut Probed)) {
        self.probed.send_modify(change);
    }

    fn come_to(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let further = stage > *now;
            *now = stage.max(*now);
            further
        });
    }

    /// Whether the own Node is being deleted.
    pub fn node_leaves(&self, leaves: bool) {
        self.lock().node_leaves = leaves;
    }

    /// What is not served on this node although the rest is: words behind the `ok` of `/readyz`.
    pub fn unserved(&self, what: Option<String>) {
        self.lock().unserved = what;
    }

    /// When a sync last left nothing waiting.
    pub fn last_updated(&self) -> Option<SystemTime> {
        self.lock().last_updated
    }

    /// What was last told to [`Health::unserved`].
    pub fn what_is_unserved(&self) -> Option<String> {
        self.lock().unserved.clone()
    }

    pub(super) fn facts(&self) -> Facts {
        self.lock().clone()
    }

    /// A holder that panicked has ended the daemon; until then its last facts are as good as any.
    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Facts {
    /// For load balancers: may this node get traffic?
    pub fn healthz(&self, now: Instant, wall: SystemTime) -> Answer {
        let eligible = !self.node_leaves;
        let mut reason = self.stuck(now);
        if !self.programmed {
            reason = Some(format!("nothing is programmed yet: {}", self.not_ready.as_deref().unwrap_or("starting")));
        } else if !eligible {
            reason = Some("the Node is being deleted".to_owned());
        }
        self.answer(reason, Some(eligible), wall)
    }

    /// For the kubelet: would a restart help?
    pub fn livez(&self, now: Instant, wall: SystemTime) -> Answer {
        self.answer(self.stuck(now), None, wall)
    }

    /// For rollouts: does this daemon do its job?
    pub fn readyz(&self) -> Answer {
        let (ok, body) = match (&self.not_ready, &self.trial) {
            (Some(reason), _) | (None, Trial::Open(reason)) => (false, format!("not ready: {reason}\n")),
            (None, Trial::Done(remark)) => {
                let unserved = self.unserved.as_ref().map(|what| format!("not served: {what}"));
                let words: Vec<String> = ["ok".to_owned()].into_iter().chain(remark.clone()).chain(unserved).collect();
                (true, words.join("; ") + "\n")
            }
        };
        Answer { ok, body }
    }

    /// Whether the proxy itself is healthy, whatever becomes of its node.
    pub fn serves(&self, now: Instant) -> bool {
        self.programmed && self.stuck(now).is_none()
    }

    fn stuck(&self, now: Instant) -> Option<String> {
        let waiting = now.saturating_duration_since(self.waiting_since?);
        (waiting > UPDATE_TIMEOUT).then(|| format!("an update has been waiting for {} s", waiting.as_secs()))
    }

    /// As kube-proxy does, a healthy daemon answers `lastUpdated` = now once it has been up to date.
    fn answer(&self, reason: Option<String>, node_eligible: Option<bool>, wall: SystemTime) -> Answer {
        let last_updated = self.last_updated.map(|at| if reason.is_none() { wall } else { at });
        let body = Body {
            last_updated: last_updated.map(rfc3339),
            current_time: rfc3339(wall),
            node_eligible,
            reason: reason.clone(),
        };
        // Serialising three strings and a bool cannot fail; an empty body would still carry the right status.
        Answer { ok: reason.is_none(), body: serde_json::to_string(&body).unwrap_or_default() }
    }
}

fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |t| format!("{t:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serving() -> Facts {
        Facts {
            programmed: true,
            not_ready: None,
            trial: Trial::Done(None),
            waiting_since: None,
            last_updated: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(100)),
            node_leaves: false,
            unserved: None,
        }
    }

    #[test]
    fn health_follows_the_oldest_waiting_update_and_the_node() {
        let start = Instant::now();
        let waiting = |facts: Facts| Facts { waiting_since: Some(start), ..facts };
        let leaving = |facts: Facts| Facts { node_leaves: true, ..facts };
        let fresh = Health::default().facts();
        let adopted = Facts { programmed: true, ..fresh.clone() };
        // name, facts, seconds since start, healthz, livez
        let table = [
            ("serving", serving(), 1000, true, true),
            ("an update waits for one minute", waiting(serving()), 60, true, true),
            ("an update waits for longer", waiting(serving()), 61, false, false),
            ("the node leaves", leaving(serving()), 0, false, true),
            ("just started", fresh.clone(), 0, false, true),
            ("started, the API server is away for long", fresh.clone(), 10_000, false, true),
            ("started on a former daemon's state", adopted.clone(), 10_000, true, true),
            ("first sync keeps failing", waiting(adopted), 61, false, false),
        ];
        for (name, facts, seconds, healthz, livez) in table {
            let now = start + Duration::from_secs(seconds);
            assert_eq!(facts.healthz(now, SystemTime::now()).ok, healthz, "healthz: {name}");
            assert_eq!(facts.livez(now, SystemTime::now()).ok, livez, "livez: {name}");
        }
    }

    #[test]
    fn bodies_are_those_of_kube_proxy() {
        let now = Instant::now();
        let wall = SystemTime::UNIX_EPOCH + Duration::from_millis(200_500);
        let leaving = Facts { node_leaves: true, ..serving() };
        assert_eq!(
            serving().healthz(now, wall).body,
            r#"{"lastUpdated":"1970-01-01T00:03:20.500Z","currentTime":"1970-01-01T00:03:20.500Z","nodeEligible":true}"#
        );
        assert_eq!(
            leaving.healthz(now, wall).body,
            r#"{"lastUpdated":"1970-01-01T00:01:40.000Z","currentTime":"1970-01-01T00:03:20.500Z","nodeEligible":false,"reason":"the Node is being deleted"}"#
        );
        assert_eq!(
            leaving.livez(now, wall).body,
            r#"{"lastUpdated":"1970-01-01T00:03:20.500Z","currentTime":"1970-01-01T00:03:20.500Z"}"#
        );
    }

    #[test]
    fn a_daemon_becomes_ready_once_and_stays_so() {
        let health = Health::default();
        assert_eq!(health.facts().readyz(), Answer { ok: false, body: "not ready: starting\n".into() });
        health.not_ready("lists are not complete");
        assert_eq!(health.facts().readyz().body, "not ready: lists are not complete\n");
        health.up_to_date(SystemTime::now());
        assert_eq!(health.facts().readyz().body, "not ready: the datapath has not been probed yet\n");
        health.probe_failed("no answer");
        assert_eq!(health.facts().readyz().body, "not ready: no answer\n");
        assert_eq!(*health.stage().borrow(), Stage::Synced);
        health.probed(None);
        health.update_waits(Instant::now());
        health.not_ready("too late");
        assert_eq!(health.facts().readyz(), Answer { ok: true, body: "ok\n".into() });
        assert_eq!(*health.stage().borrow(), Stage::Ready);
        health.probed(Some("not probed: elsewhere"));
        assert_eq!(health.facts().readyz(), Answer { ok: true, body: "ok; not probed: elsewhere\n".into() });
        health.unserved(Some("device ib0: InfiniBand".into()));
        let body = "ok; not probed: elsewhere; not served: device ib0: InfiniBand\n".into();
        assert_eq!(health.facts().readyz(), Answer { ok: true, body });
    }

    #[test]
    fn the_oldest_update_counts_until_all_are_in() {
        let health = Health::default();
        let first = Instant::now();
        health.update_waits(first);
        health.update_waits(first + Duration::from_secs(50));
        assert_eq!(health.facts().waiting_since, Some(first));
        health.up_to_date(SystemTime::now());
        assert_eq!(health.facts().waiting_since, None);
    }
}
