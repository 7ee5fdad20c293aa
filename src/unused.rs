//! Local mode: says which volumes no pod has used for long. There are no records of them in the API server that would show that
//! nobody wants them any more: their claims may have been deleted while their pool was not configured, or their node was away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;

use crate::metrics::Metrics;
use crate::volume::Node;
use crate::volume::disk::PoolVolume;
use crate::volume::id::VolumeId;

/// How long no pod has used them.
const LONG: Duration = Duration::from_hours(30 * 24);

/// How often to look: at first, pools may still be being opened.
const FIRST: Duration = Duration::from_secs(2);
const PERIOD: Duration = Duration::from_hours(1);

/// How many are named in the log.
const NAMED_MAX: usize = 20;

/// Runs forever: logs which volumes are unused at start, and whenever there are others.
pub(crate) async fn watch(node: Arc<Node>, metrics: Arc<Metrics>) -> std::convert::Infallible {
    let mut known = BTreeSet::new();
    loop {
        let Some(unused) = node.unused(LONG) else {
            sleep(FIRST).await;
            continue;
        };
        metrics.set_unused(unused.len());
        let ids: BTreeSet<VolumeId> = unused.iter().map(|volume| volume.id.clone()).collect();
        if !ids.is_subset(&known) {
            let named: Vec<String> = unused.iter().take(NAMED_MAX).map(describe).collect();
            warn!(
                node = %node.name(), volumes = unused.len(), named = named.join(", "),
                "no pod has used these volumes for 30 days; if `kubectl get pv ID` finds nothing, nobody can: then remove \
                 `volumes/<id>` from the pool, and restart hostdir"
            );
        }
        known = ids;
        sleep(PERIOD).await;
    }
}

fn describe(volume: &PoolVolume) -> String {
    let record = volume.record.as_ref().ok();
    let claim = record.and_then(|record| record.spec.claim.as_ref());
    let claim = claim.map_or_else(String::new, |claim| {
        format!(" (claim {}/{})", claim.namespace, claim.name)
    });
    format!("{}{claim}", volume.id)
}
