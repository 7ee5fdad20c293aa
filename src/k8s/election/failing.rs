//! Tasks that are tried again and again: logs once when a task begins to fail, and once when it works again.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::k8s::client::{Problem, Refusal};
use crate::volume::Reason;

/// A starting API server refuses what it accepts a moment later (it answers before it knows all Pods and rights). Refusals
/// that last at least this long count.
const REFUSED: Duration = Duration::from_secs(15);

#[derive(Default)]
pub(super) struct Failing {
    why: Option<String>,
    pub(super) refused: Option<Instant>,
}

impl Failing {
    /// Notes that the task works.
    pub(super) fn ended(&mut self, what: &str) {
        self.refused = None;
        if self.why.take().is_some() {
            info!("{what}");
        }
    }

    pub(super) fn because(&mut self, why: &str, what: &str) {
        if self.why.as_deref() != Some(why) {
            warn!(why, "{what}");
            self.why = Some(why.to_owned());
        }
    }

    /// Returns why this process must end, if it must. A refused token (401) belongs to a Pod that is gone; so does one
    /// without the right (403) to write what only this process may write (`ours`).
    pub(super) fn refused(&mut self, problem: Problem, ours: bool, now: Instant) -> Option<String> {
        let meant = match &problem {
            Problem::Refused(Refusal::Unauthorized, _) => true,
            Problem::Refused(Refusal::Forbidden, _) => ours,
            _ => false,
        };
        let why = Reason::from(problem).to_string();
        if !meant {
            self.refused = None;
        } else if now - *self.refused.get_or_insert(now) >= REFUSED {
            return Some(format!("the API server refuses it: {why}"));
        }
        self.because(&why, "cannot take part in the election; trying again");
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::k8s::client::api_error;

    fn refused(how: Refusal) -> Problem {
        Problem::Refused(how, api_error("try", "no".into()))
    }

    /// After how many seconds of refusals, one each second, they count.
    fn until_meant(failing: &mut Failing, how: Refusal, ours: bool) -> Option<u64> {
        let start = Instant::now();
        (0..100).find(|second| {
            let now = start + Duration::from_secs(*second);
            failing.refused(refused(how), ours, now).is_some()
        })
    }

    #[test]
    fn only_a_refusal_that_lasts_is_meant() {
        let meant = |how, ours| until_meant(&mut Failing::default(), how, ours);
        assert_eq!(meant(Refusal::Unauthorized, false), Some(15));
        assert_eq!(meant(Refusal::Unauthorized, true), Some(15));
        assert_eq!(meant(Refusal::Forbidden, true), Some(15));
        // An administrator may have taken away the right, which proves nothing.
        assert_eq!(meant(Refusal::Forbidden, false), None);
    }

    #[test]
    fn any_other_answer_in_between_begins_anew() {
        let mut failing = Failing::default();
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(0)), None);
        assert_eq!(failing.refused(Problem::Conflict("try"), true, at(14)), None);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(15)), None);
        failing.ended("it works again");
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), true, at(31)), None);
        let why = failing.refused(refused(Refusal::Unauthorized), true, at(46)).unwrap();
        assert!(why.contains("cannot try: no"), "{why}");
    }
}
