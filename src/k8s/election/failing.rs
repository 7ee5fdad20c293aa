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

    /// Returns why this process must end, if it must: a token that is refused (401) belongs to a Pod that is gone. A right that
    /// is missing (403) proves nothing: somebody may have edited roles, policies or quotas.
    pub(super) fn refused(&mut self, problem: Problem, now: Instant) -> Option<String> {
        let meant = matches!(problem, Problem::Refused(Refusal::Unauthorized, _));
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
    fn until_meant(failing: &mut Failing, how: Refusal) -> Option<u64> {
        let start = Instant::now();
        (0..100).find(|second| {
            let now = start + Duration::from_secs(*second);
            failing.refused(refused(how), now).is_some()
        })
    }

    #[test]
    fn only_a_refused_token_is_meant_and_only_if_it_stays_refused() {
        let meant = |how| until_meant(&mut Failing::default(), how);
        assert_eq!(meant(Refusal::Unauthorized), Some(15));
        assert_eq!(meant(Refusal::Forbidden), None);
    }

    #[test]
    fn any_other_answer_in_between_begins_anew() {
        let mut failing = Failing::default();
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), at(0)), None);
        assert_eq!(failing.refused(Problem::Conflict("try"), at(14)), None);
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), at(15)), None);
        failing.ended("it works again");
        assert_eq!(failing.refused(refused(Refusal::Unauthorized), at(31)), None);
        let why = failing.refused(refused(Refusal::Unauthorized), at(46)).unwrap();
        assert!(why.contains("cannot try: no"), "{why}");
    }
}
