//! Whether a sidecar that leads does its work.
//!
//! A sidecar can renew its Lease for ever and do nothing: its caches wait for a list that is refused, its watch is silent, all
//! its workers hang. What it takes up, it finishes soon, even if only by a failure that it tries again. So if something waits
//! and its queue has finished nothing since, it does not work.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long something may wait while nothing at all is finished. Sidecars give up a call after 10 to 30 s, and then try the
/// next one.
const PATIENCE: Duration = Duration::from_secs(45);
/// How much longer a sidecar may take that has finished nothing since it was started, for each thousand objects that it has to
/// list first.
const LISTING: Duration = Duration::from_secs(1);
/// How long something may wait since anything was finished, if something was finished while it waited: it may have been this very
/// item, which failed. Sidecars try what has failed again after five minutes at most, and all their objects every 15 minutes.
const AGAIN: Duration = Duration::from_mins(16);
/// For how long a controller whose sidecar did not work counts as one that could not lead: what is wrong is probably still
/// wrong. After that it is tried again.
const DISTRUST: Duration = Duration::from_mins(5);

/// One item that waits.
#[derive(Debug)]
struct Item {
    since: Duration,
    /// How much was finished then.
    finished: u64,
    patience: Duration,
}

/// One queue of a sidecar: what waits for it, and how much it has finished.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: BTreeMap<String, Item>,
    /// At the last look.
    finished: u64,
    leads: bool,
    /// When the sidecar last did not work, and why that was said.
    stuck: Option<(Duration, String)>,
}

impl Queue {
    /// Looks at the queue at `now`, a time by a monotonic clock that counts while the API server answers: whether the sidecar
    /// leads, what waits for it, how many items it has finished since it was started, and how many objects it has to list before
    /// it begins.
    pub(crate) fn look(
        &mut self,
        now: Duration,
        leads: bool,
        waiting: &BTreeSet<String>,
        finished: u64,
        objects: usize,
    ) {
        let before = std::mem::replace(&mut self.finished, finished);
        let has_led = std::mem::replace(&mut self.leads, leads);
        let is_new = finished < before || !has_led;
        if is_new || !leads {
            self.waiting.clear();
        }
        self.stuck.take_if(|(at, _)| now.saturating_sub(*at) >= DISTRUST);
        if !leads {
            return;
        }
        if finished > before {
            self.stuck = None;
        }
        // Until it leads, it finishes nothing. What it has finished since the last look may have been this item.
        let then = if is_new { 0 } else { before };
        let listing = LISTING * u32::try_from(objects / 1000).unwrap_or(u32::MAX);
        let patience = PATIENCE + if then == 0 { listing } else { Duration::ZERO };
        self.waiting.retain(|item, _| waiting.contains(item));
        for name in waiting {
            let item = self.waiting.entry(name.clone()).or_insert(Item {
                since: now,
                finished: then,
                patience,
            });
            if item.finished != finished {
                *item = Item {
                    since: now,
                    finished,
                    patience: AGAIN,
                };
            }
        }
        let waits_too_long = |(_, item): &(&String, &Item)| now.saturating_sub(item.since) >= item.patience;
        if let Some((name, item)) = self.waiting.iter().find(waits_too_long) {
            let seconds = now.saturating_sub(item.since).as_secs();
            let why = format!("its sidecar has finished nothing for {seconds} s, while {name} waits");
            self.stuck = Some((now, why));
        }
    }

    /// Why this controller could not lead, if the sidecar did not work lately.
    pub(crate) fn stuck(&self) -> Option<&str> {
        self.stuck.as_ref().map(|(_, why)| why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(queue: &mut Queue, second: u64, leads: bool, waiting: &[&str], finished: u64) -> bool {
        let waiting = waiting.iter().map(|item| (*item).to_owned()).collect();
        queue.look(Duration::from_secs(second), leads, &waiting, finished, 0);
        queue.stuck().is_some()
    }

    /// Looks every three seconds as the leader, and returns after how many seconds the queue is stuck.
    fn until_stuck(
        queue: &mut Queue,
        from: u64,
        seconds: u64,
        waiting: &[&str],
        finished: impl Fn(u64) -> u64,
    ) -> Option<u64> {
        (0..=seconds)
            .step_by(3)
            .find(|second| look(queue, from + second, true, waiting, finished(*second)))
    }

    /// The queue of a leader that has finished something.
    fn leading(finished: u64) -> Queue {
        let mut queue = Queue::default();
        for second in 0..3 {
            assert!(!look(&mut queue, second, true, &[], finished));
        }
        queue
    }

    #[test]
    fn a_leader_that_finishes_nothing_while_something_waits_does_not_work() {
        let mut queue = Queue::default();
        assert_eq!(until_stuck(&mut queue, 0, 300, &[], |_| 0), None, "nothing waits");
        assert_eq!(until_stuck(&mut queue, 303, 300, &["claim a"], |_| 0), Some(45));
        let why = "its sidecar has finished nothing for 45 s, while claim a waits";
        assert_eq!(queue.stuck(), Some(why));
    }

    #[test]
    fn one_that_has_much_to_list_has_more_time() {
        let mut queue = Queue::default();
        let waiting = ["claim a".to_owned()].into();
        let stuck = (0..300).find(|second| {
            queue.look(Duration::from_secs(*second), true, &waiting, 0, 100_000);
            queue.stuck().is_some()
        });
        assert_eq!(stuck, Some(145));
    }

    #[test]
    fn what_was_taken_up_may_fail_and_wait_for_long() {
        let mut queue = leading(7);
        // It is tried again only after minutes.
        assert_eq!(until_stuck(&mut queue, 3, 900, &["claim bad"], |_| 8), None);
        // Something else comes meanwhile, and the sidecar does not see it.
        assert_eq!(
            until_stuck(&mut queue, 903, 600, &["claim bad", "claim new"], |_| 8),
            Some(45)
        );
    }

    #[test]
    fn one_that_hangs_after_it_has_finished_something_is_found_later() {
        let mut queue = leading(7);
        let finished = |second| if second < 30 { 7 } else { 8 };
        assert_eq!(
            until_stuck(&mut queue, 3, 1200, &["claim a", "claim b"], finished),
            Some(30 + 16 * 60)
        );
    }

    #[test]
    fn an_item_may_be_finished_before_it_is_seen_to_wait() {
        let mut queue = leading(1);
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim bad"], |_| 2), None);
        // The driver is restarted, and its sidecars with it, which take up everything at once.
        let mut queue = Queue::default();
        assert_eq!(until_stuck(&mut queue, 0, 600, &["claim bad"], |_| 1), None);
        // It has just begun to lead.
        let mut queue = Queue::default();
        look(&mut queue, 0, false, &["claim bad"], 1);
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim bad"], |_| 1), None);
    }

    #[test]
    fn a_sidecar_that_was_started_anew_has_its_time() {
        let mut queue = leading(5);
        let restarted = |second: u64| if second < 30 { 5 } else { 0 };
        assert_eq!(until_stuck(&mut queue, 3, 600, &["claim a"], restarted), Some(75));
    }

    #[test]
    fn who_did_not_work_is_trusted_again_after_a_while_or_when_it_works() {
        let stuck = || {
            let mut queue = Queue::default();
            assert_eq!(until_stuck(&mut queue, 0, 300, &["claim a"], |_| 0), Some(45));
            queue
        };
        let mut queue = stuck();
        // It has lost the Lease.
        assert!(look(&mut queue, 45 + 299, false, &[], 0));
        assert!(!look(&mut queue, 45 + 300, false, &[], 0));
        assert!(!look(&mut stuck(), 48, true, &["claim a"], 1));
    }

    #[test]
    fn who_does_not_lead_has_no_work() {
        let mut queue = Queue::default();
        for second in 0..600 {
            assert!(!look(&mut queue, second, false, &["claim a"], 0));
        }
        // From now on it has its time.
        assert_eq!(until_stuck(&mut queue, 600, 300, &["claim a"], |_| 0), Some(45));
    }
}
