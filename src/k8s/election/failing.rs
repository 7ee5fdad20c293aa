//! Tasks that are tried again and again: the log says once that one begins to fail, and once that it works again.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::k8s::client::{Problem, Refusal};
use crate::volume::Reason;

/// An API server that starts refuses what it accepts a moment later (it answers before it knows all Pods and rights). Refusals
/// that last longer than this are meant.
const REFUSED: Duration = Duration::from_secs(15);

#[derive(Default)]
pub(super) struct Failing {
    why: Option<String>,
    pub(super) refused: Option<Instant>,
}

impl Failing {
    /// It works.
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

    /// Returns why this process must end, if it must: a token that is refused (401) is that of a Pod that is gone; so is one without
    /// the right (403) to write what only this process may write (`ours`).
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

    /// After how many seconds of a refusal each second it is meant.
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
        // A right that an administrator has taken away is no proof of anything.
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
