//! Tells the host of containers that ran out of memory, before it tells their exits.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::error::Error;

/// The out-of-memory kills that the host has not been told of.
#[derive(Debug, Default)]
pub struct Kills {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    untold: VecDeque<String>,
    question: Option<oneshot::Sender<String>>,
    /// Whether the host asks at all: if not, nobody waits for it to.
    asked: bool,
}

impl Kills {
    /// The next kill, as soon as there is one. A second question ends the first.
    pub async fn next(&self) -> Result<String, Error> {
        let answer = {
            let mut state = self.state();
            state.asked = true;
            if let Some(id) = state.untold.pop_front() {
                self.changed.notify_waiters();
                return Ok(id);
            }
            let (question, answer) = oneshot::channel();
            state.question = Some(question);
            answer
        };
        answer.await.map_err(|_| {
            Error::FailedPrecondition(
                "another call has asked for the next out-of-memory kill".into(),
            )
        })
    }

    /// Notes a kill in a container.
    pub fn add(&self, id: &str) {
        let mut state = self.state();
        let untold = match state.question.take() {
            Some(question) => question.send(id.to_owned()).err(),
            None => Some(id.to_owned()),
        };
        state.untold.extend(untold);
    }

    /// Waits until the host has been told of all kills, if it asks for them.
    pub async fn told(&self) {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                if !state.asked || state.untold.is_empty() {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Notes that nobody asks any more, because the connection has ended.
    pub fn disconnected(&self) {
        let mut state = self.state();
        state.asked = false;
        state.question = None;
        self.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn kills_are_told_in_order_and_once() {
        let kills = Kills::default();
        kills.add("a");
        kills.add("b");
        assert_eq!(kills.next().await.unwrap(), "a");
        assert_eq!(kills.next().await.unwrap(), "b");
        let (next, ()) = tokio::join!(kills.next(), async { kills.add("c") });
        assert_eq!(next.unwrap(), "c");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_kill_whose_question_was_dropped_is_kept() {
        let kills = Kills::default();
        {
            let mut question = Box::pin(kills.next());
            tokio::select! {
                biased;
                _ = &mut question => unreachable!(),
                () = std::future::ready(()) => {}
            }
        }
        kills.add("a");
        assert_eq!(kills.next().await.unwrap(), "a");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn exits_wait_only_for_a_host_that_asks() {
        let kills = Kills::default();
        kills.add("a");
        kills.told().await;
        assert_eq!(kills.next().await.unwrap(), "a");
        kills.add("b");
        let told = async {
            kills.told().await;
            "told"
        };
        let (told, next) = tokio::join!(told, kills.next());
        assert_eq!((told, next.unwrap().as_str()), ("told", "b"));
        kills.add("c");
        tokio::join!(kills.told(), async { kills.disconnected() });
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_second_question_ends_the_first() {
        let kills = Kills::default();
        let (first, second, ()) =
            tokio::join!(kills.next(), kills.next(), async { kills.add("a") });
        assert!(first.is_err());
        assert_eq!(second.unwrap(), "a");
    }
}
