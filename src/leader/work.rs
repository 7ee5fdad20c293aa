//! Whether a sidecar that leads does its work.
//!
//! A sidecar can renew its Lease for ever and do nothing: its caches wait for a list that is refused, its watch is silent, all
//! its workers hang. What it takes up, it finishes soon, even if only by a failure that it tries again. So if something waits
//! and its queue has finished nothing since, it does not work.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long something may wait while nothing at all is finished. Sidecars give up a call after 10 to 30 s, and then try the
/// next one.
pub(super) const PATIENCE: Duration = Duration::from_secs(45);
/// For how long a controller whose sidecar did not work counts as one that could not lead: what is wrong is probably still
/// wrong. After that it is tried again.
pub(super) const DISTRUST: Duration = Duration::from_mins(5);

/// One queue of a sidecar: what waits for it, and how much it has finished.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// What waits: since when, and how much was finished before that.
    waiting: BTreeMap<String, (Duration, u64)>,
    /// How much was finished at the last look.
    finished: Option<u64>,
    /// When the sidecar last did not work, and why that was said.
    stuck: Option<(Duration, String)>,
}

impl Queue {
    /// Looks at the queue at `now`, a time by a monotonic clock: what waits for it, and how many items it has finished since
    /// the sidecar was started. Returns why this controller could not lead, if that is so.
    pub(crate) fn look(
        &mut self,
        now: Duration,
        leads: bool,
        waiting: &BTreeSet<String>,
        finished: u64,
    ) -> Option<&str> {
        let before = self.finished.replace(finished).unwrap_or(finished);
        if finished < before {
            // The sidecar was started anew.
            self.waiting.clear();
        }
        if leads {
            self.waiting.retain(|item, _| waiting.contains(item));
            for item in waiting {
                self.waiting.entry(item.clone()).or_insert((now, before.min(finished)));
            }
            if finished > before {
                self.stuck = None;
            }
            let stuck = self
                .waiting
                .iter()
                .find(|(_, (since, then))| *then == finished && now.saturating_sub(*since) >= PATIENCE);
            if let Some((item, (since, _))) = stuck {
                let seconds = now.saturating_sub(*since).as_secs();
                let why = format!("its sidecar has finished nothing for {seconds} s, while {item} waits");
                self.stuck = Some((now, why));
            }
        } else {
            self.waiting.clear();
        }
        self.stuck.take_if(|(at, _)| now.saturating_sub(*at) >= DISTRUST);
        self.stuck.as_ref().map(|(_, why)| why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every three seconds, and returns after how many seconds the queue is stuck.
    fn until_stuck(
        queue: &mut Queue,
        from: u64,
        seconds: u64,
        waiting: &[&str],
        finished: impl Fn(u64) -> u64,
    ) -> Option<u64> {
        let waiting = waiting.iter().map(|item| (*item).to_owned()).collect();
        (0..=seconds).step_by(3).find(|second| {
            let now = Duration::from_secs(from + second);
            queue.look(now, true, &waiting, finished(*second)).is_some()
        })
    }

    #[test]
    fn a_leader_that_finishes_nothing_while_something_waits_does_not_work() {
        let mut queue = Queue::default();
        assert_eq!(until_stuck(&mut queue, 0, 300, &[], |_| 0), None, "nothing waits");
        assert_eq!(until_stuck(&mut queue, 303, 300, &["claim a"], |_| 0), Some(45));
        let why = queue.stuck.as_ref().unwrap().1.clone();
        assert_eq!(why, "its sidecar has finished nothing for 45 s, while claim a waits");
    }

    #[test]
    fn what_was_taken_up_may_fail_and_wait_for_long() {
        let mut queue = Queue::default();
        queue.look(Duration::ZERO, true, &BTreeSet::new(), 7);
        // It is tried again only after minutes.
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim bad"], |_| 8), None);
        // Something else comes meanwhile, and the sidecar does not see it.
        assert_eq!(
            until_stuck(&mut queue, 606, 600, &["claim bad", "claim new"], |_| 8),
            Some(45)
        );
    }

    #[test]
    fn an_item_may_be_finished_before_it_is_seen_to_wait() {
        let mut queue = Queue::default();
        queue.look(Duration::ZERO, true, &BTreeSet::new(), 0);
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim bad"], |_| 1), None);
    }

    #[test]
    fn a_sidecar_that_was_started_anew_has_its_time() {
        let mut queue = Queue::default();
        queue.look(Duration::ZERO, true, &BTreeSet::new(), 5);
        let restarted = |second: u64| if second < 30 { 5 } else { 0 };
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim a"], restarted), Some(75));
    }

    #[test]
    fn who_did_not_work_is_trusted_again_after_a_while_or_when_it_works() {
        let mut queue = Queue::default();
        assert_eq!(until_stuck(&mut queue, 0, 300, &["claim a"], |_| 0), Some(45));
        let none = BTreeSet::new();
        let at = |seconds: u64| Duration::from_secs(45 + seconds);
        // It has lost the Lease.
        assert!(queue.look(at(299), false, &none, 0).is_some());
        assert!(queue.look(at(300), false, &none, 0).is_none());

        let mut queue = Queue::default();
        assert_eq!(until_stuck(&mut queue, 0, 300, &["claim a"], |_| 0), Some(45));
        let waiting = ["claim a".to_owned()].into();
        assert!(queue.look(at(3), true, &waiting, 1).is_none());
    }

    #[test]
    fn who_does_not_lead_has_no_work() {
        let mut queue = Queue::default();
        let waiting = ["claim a".to_owned()].into();
        for second in 0..600 {
            assert!(queue.look(Duration::from_secs(second), false, &waiting, 0).is_none());
        }
        // From now on it has its time.
        assert_eq!(until_stuck(&mut queue, 600, 300, &["claim a"], |_| 0), Some(45));
    }
}
