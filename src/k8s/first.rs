//! The first request makes the connection that the others use. hyper learns that a server speaks HTTP/2 when a connection is
//! up: requests that come before would each make one of their own, and all but one would be thrown away. Five thousand
//! daemons that start together, or come back to a server together, would shake hands twenty thousand times.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::timeout;
use tower::Service;

/// So long the others wait for the first: a server that does not answer is asked by all of them, as if there were no first.
const WAIT: Duration = Duration::from_secs(1);

/// Lets one request go first wherever the last one failed.
#[derive(Clone, Debug)]
pub struct FirstAlone<S> {
    inner: S,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The last request was answered.
    is_up: AtomicBool,
    first: Mutex<()>,
}

impl<S> FirstAlone<S> {
    pub fn new(inner: S) -> Self {
        FirstAlone { inner, state: Arc::default() }
    }
}

impl<S, R> Service<R> for FirstAlone<S>
where
    S: Service<R> + Clone + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Send,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: R) -> Self::Future {
        // What was polled has to be what is called.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            let turn = match state.is_up.load(Relaxed) {
                true => None,
                false => timeout(WAIT, state.first.lock()).await.ok(),
            };
            let turn = turn.filter(|_| !state.is_up.load(Relaxed));
            let answer = inner.call(request).await;
            state.is_up.store(answer.is_ok(), Relaxed);
            drop(turn);
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as StdMutex;

    use futures::future::join_all;
    use tokio::time::{Instant, sleep};
    use tower::{ServiceExt as _, service_fn};

    use super::*;

    /// When each of these requests began, in milliseconds, of three that came at once; a request is what it takes and
    /// whether it is answered.
    async fn begun(client: &FirstAlone<impl Test>, log: &StdMutex<Vec<u128>>, request: (u64, bool)) -> Vec<u128> {
        join_all((0..3).map(|_| client.clone().oneshot(request))).await;
        std::mem::take(&mut *log.lock().unwrap())
    }

    trait Test: Service<(u64, bool), Response = (), Error = (), Future: Send> + Clone + Send + 'static {}
    impl<S: Service<(u64, bool), Response = (), Error = (), Future: Send> + Clone + Send + 'static> Test for S {}

    #[tokio::test(start_paused = true)]
    async fn one_request_goes_first_until_one_is_answered_and_nobody_waits_long_for_it() {
        let (log, start) = (Arc::new(StdMutex::new(Vec::new())), Instant::now());
        let noted = Arc::clone(&log);
        let client = FirstAlone::new(service_fn(move |(takes, is_answered): (u64, bool)| {
            noted.lock().unwrap().push(start.elapsed().as_millis());
            async move {
                sleep(Duration::from_millis(takes)).await;
                is_answered.then_some(()).ok_or(())
            }
        }));
        assert_eq!(
            begun(&client, &log, (200, false)).await,
            [0, 200, 400],
            "one after another, while there is no answer"
        );
        assert_eq!(begun(&client, &log, (200, true)).await, [600, 800, 800]);
        assert_eq!(begun(&client, &log, (200, false)).await, [1000, 1000, 1000]);
        assert_eq!(begun(&client, &log, (60_000, true)).await, [1200, 2200, 2200], "a server that hangs");
    }
}
