//! When the state of a node's pools is worth a write. The free space of a busy disk changes all the time, and a thousand nodes that
//! wrote each change would keep the API server busy.

use std::time::Duration;

use crate::k8s::api::{HostNodeStatus, PoolStatus};
use crate::k8s::convert;
use crate::volume::size::Bytes;

/// The shortest time between two writes for free space alone.
const SPACE_PERIOD: Duration = Duration::from_mins(1);

/// Whether to write `next`, of which the API server has `last`. Changes of free space alone are written at most once a minute, and
/// only if a pool's room changes: often it is what is not allocated, however full the disk is.
///
/// `since` is how long ago this process wrote last, and `allocated` how much of a pool is allocated, if that is known.
pub(super) fn is_due(
    last: &HostNodeStatus,
    next: &HostNodeStatus,
    since: Option<Duration>,
    allocated: impl Fn(&str) -> Option<Bytes>,
) -> bool {
    if last == next {
        return false;
    }
    if without_space(last) != without_space(next) {
        return true;
    }
    let rested = since.is_none_or(|since| since >= SPACE_PERIOD);
    let matters = |(last, next): (&PoolStatus, &PoolStatus)| {
        let allocated = allocated(&next.name);
        allocated.is_none_or(|allocated| convert::room(last, allocated) != convert::room(next, allocated))
    };
    rested && last.pools.iter().zip(&next.pools).any(matters)
}

fn without_space(status: &HostNodeStatus) -> HostNodeStatus {
    let mut status = status.clone();
    for pool in &mut status.pools {
        // Whether there is a size says whether the pool can be used.
        pool.free = None;
        pool.total = pool.total.take().map(|_| String::new());
    }
    for condition in &mut status.conditions {
        // It has figures of the space.
        condition.message.clear();
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn status(free_gib: u64) -> HostNodeStatus {
        let pool = PoolStatus {
            name: "default".into(),
            total: Some("1000Gi".into()),
            free: Some(format!("{free_gib}Gi")),
            reserve: "0".into(),
            overcommit: 1.0,
            ..PoolStatus::default()
        };
        HostNodeStatus {
            pools: vec![pool],
            ..HostNodeStatus::default()
        }
    }

    fn is_due_after(last: &HostNodeStatus, next: &HostNodeStatus, seconds: u64, allocated_gib: u64) -> bool {
        let since = Some(Duration::from_secs(seconds));
        is_due(last, next, since, |_| Some(Bytes(allocated_gib * GIB)))
    }

    #[test]
    fn free_space_alone_is_written_once_a_minute_and_only_when_the_room_changes() {
        let (last, next) = (status(900), status(800));
        assert!(
            is_due_after(&last, &next, 60, 0),
            "others fill the disk, and less room is left"
        );
        assert!(!is_due_after(&last, &next, 59, 0));
        assert!(
            !is_due_after(&last, &next, 600, 300),
            "volumes fill what is allocated to them"
        );
        assert!(is_due(&last, &next, None, |_| None), "what is allocated is not known");
        assert!(!is_due_after(&last, &last, 600, 0));
    }

    #[test]
    fn what_else_changes_is_written_at_once() {
        let last = status(900);
        let mut broken = status(900);
        broken.pools[0].total = None;
        broken.pools[0].message = Some("its disk is missing".into());
        let mut orphaned = status(900);
        orphaned.orphan_count = 1;
        for next in [broken, orphaned] {
            assert!(is_due_after(&last, &next, 0, 0), "{next:?}");
        }
    }

    /// Disks whose free space goes up and down by up to half a percent every 4 s, as on build nodes.
    #[test]
    fn busy_nodes_write_little() {
        const NODES: u64 = 20;
        let mut seed = 1_u64;
        let mut random = move || {
            // Knuth's MMIX generator: any sequence will do.
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        };
        let writes = |allocated_gib: u64, random: &mut dyn FnMut() -> u64| {
            let mut writes = 0;
            for _ in 0..NODES {
                let (mut published, mut free, mut written) = (status(500), 500, None);
                for pass in 0..900_u64 {
                    free = (free + random() % 11).saturating_sub(5).clamp(400, 600);
                    let since = written.map(|written| Duration::from_secs((pass - written) * 4));
                    let next = status(free);
                    if is_due(&published, &next, since, |_| Some(Bytes(allocated_gib * GIB))) {
                        (published, written) = (next, Some(pass));
                        writes += 1;
                    }
                }
            }
            writes
        };
        // An hour has 900 passes.
        let others = writes(0, &mut random);
        let volumes = writes(700, &mut random);
        println!("{NODES} nodes, writes in an hour: {others} if others fill the disks, {volumes} if volumes do");
        assert!(others <= 61 * NODES, "{others}");
        assert_eq!(volumes, 0);
    }
}
