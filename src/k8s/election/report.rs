//! The report of `hostdir leader`.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Client, ResourceExt};

use super::leases::{Elections, HAND_OVER, Reading, election};
use crate::leader::Guilt;
use crate::volume::Reason;

/// Reports who holds each of these Leases, whether the holder may lead, and who stands by. Also returns whether every Lease
/// is held by a controller that may lead. Ages are by the clock of this machine.
///
/// # Errors
/// The API server does not answer, or none of the Leases exists.
pub(crate) async fn report(
    client: Client,
    namespace: &str,
    leases: &[String],
    controllers: &str,
) -> anyhow::Result<(String, bool)> {
    let elections = Elections::new(client, namespace, leases.to_vec(), controllers.to_owned());
    let reading = elections.read().await.map_err(Reason::from)?;
    let found: Vec<&Lease> = leases.iter().filter_map(|name| reading.leases.get(name)).collect();
    anyhow::ensure!(
        !found.is_empty(),
        "there is no Lease {} in namespace {namespace}: nobody has ever led; is hostdir installed there, in elected mode?",
        leases.join(" or ")
    );
    let (mut text, mut well) = (String::new(), true);
    for lease in found {
        let (about, leads) = holder(&reading, lease);
        well &= leads;
        text += &about;
    }
    Ok((text, well))
}

/// The controllers that do not hold the Lease, and whether they could lead.
fn others(reading: &Reading, holder: &str) -> String {
    let mut text = String::new();
    for (name, controller) in &reading.view.controllers {
        if name != holder {
            let guilt = Guilt::at_first_sight(Some(controller), silence(reading, name));
            let state = guilt.map_or("could lead".to_owned(), |guilt| format!("could not lead: {guilt}"));
            let _ = writeln!(text, "stands by        {name} on node {}: {state}", controller.node);
        }
    }
    text
}

/// The report on a Lease, its holder and who stands by. Also returns whether the holder leads and may lead.
fn holder(reading: &Reading, lease: &Lease) -> (String, bool) {
    let election = election(lease);
    let renewed = lease
        .spec
        .as_ref()
        .and_then(|spec| Some(ago(spec.renew_time.as_ref()?.0)));
    let controller = reading.view.controllers.get(&election.holder);
    let silence = silence(reading, &election.holder);
    let mut text = format!("Lease            {}\n", lease.name_any());
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:<16} {value}");
    };
    let seconds = |age: Option<Duration>| age.map_or("never".to_owned(), |age| format!("{} s ago", age.as_secs()));
    let guilt = Guilt::at_first_sight(controller, silence);
    let expired = renewed.is_none_or(|age| age > Duration::from_secs(election.term));
    if election.holder.is_empty() {
        line("holder", "nobody");
    } else {
        line("holder", &election.holder);
        line("renewed", &seconds(renewed));
        line("on node", controller.map_or("unknown: it has no Pod", |one| &one.node));
        line("heartbeat", &seconds(silence));
    }
    if let Some(note) = lease.annotations().get(HAND_OVER) {
        line("last hand-over", note);
    }
    let verdict = match &guilt {
        _ if election.holder.is_empty() => "nobody leads; the sidecars elect a leader within seconds".to_owned(),
        _ if expired => "nobody leads: the Lease has expired; a healthy sidecar takes it within seconds".to_owned(),
        Some(guilt) => {
            format!("it must not lead: {guilt}. A controller that can lead takes over; deploy/README.md says when")
        }
        None => "it leads".to_owned(),
    };
    line("verdict", &verdict);
    // The holder of one Lease stands by for the others.
    text += &others(reading, &election.holder);
    (text, guilt.is_none() && !expired && !election.holder.is_empty())
}

/// How long ago a controller sent its last heartbeat; `None` if it never sent one.
fn silence(reading: &Reading, controller: &str) -> Option<Duration> {
    reading.view.heartbeats.get(controller).copied().map(ago)
}

fn ago(then: Timestamp) -> Duration {
    Timestamp::now().duration_since(then).try_into().unwrap_or_default()
}
