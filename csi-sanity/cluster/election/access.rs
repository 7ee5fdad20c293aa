//! Who may write the Leases, and how hostdir reports who leads.

use super::broken::WithoutPolicy;
use super::{Election, LEASE, POLICY, RESIZER_LEASE, name_of};
use crate::rights::Holder;
use hostdir_lab::cluster::NAMESPACE;
use hostdir_lab::needs;
use serde_json::json;

/// Only a token that is bound to a running Pod can write a Lease, and only with that Pod's name.
#[needs(Root, Go, Cluster)]
fn leases_are_written_only_by_the_pod_that_they_name() {
    let election = Election::begin(
        "ghost-policy",
        "who may write the Leases, and how hostdir reports who leads",
    );
    election.lab.join_network().unwrap();
    let (leader, _) = election.leader();
    let other = election
        .lab
        .controllers()
        .iter()
        .map(name_of)
        .find(|name| *name != leader)
        .unwrap();
    let hold = |token: &str, lease: &str, holder: &str| election.hold(token, lease, holder);
    let (unbound, bound) = (election.token(None), election.token(Some(&other)));
    for (what, refused) in [
        ("with an unbound token", hold(&unbound, LEASE, &other)),
        ("in the leader's name", hold(&bound, LEASE, &leader)),
        ("emptying another's Lease", hold(&bound, LEASE, "")),
        ("another's heartbeat", hold(&bound, &leader, &other)),
        ("a heartbeat with an unbound token", hold(&unbound, &other, &other)),
    ] {
        let error = refused.expect_err(what).to_string();
        assert!(error.contains(POLICY), "{what}: {error}");
    }
    // An administrator cannot change the Lease by accident either.
    let patch = r#"{"spec":{"holderIdentity":"me"}}"#;
    let slip = election
        .lab
        .kubectl()
        .run(&["patch", "lease", LEASE, "-n", NAMESPACE, "--type=merge", "-p", patch]);
    assert!(format!("{:#}", slip.unwrap_err()).contains("only a controller of hostdir"));
    // What changes nothing that counts may be written: labels, a migration of the storage.
    let write = |verb: &str, lease: &str, what: &str| {
        election
            .lab
            .kubectl()
            .run(&[verb, "lease", lease, "-n", NAMESPACE, what])
    };
    write("label", LEASE, "example.org/tried=yes").unwrap();
    write("label", LEASE, "example.org/tried-").unwrap();
    let slip = write("annotate", &other, "hostdir.csi/elections-").unwrap_err();
    assert!(format!("{slip:#}").contains("only a controller of hostdir"), "{slip:#}");
    hold(&bound, &other, &other).expect("a pod may write its own heartbeat");
    let another = json!({"metadata": {"name": "another"}, "spec": {"holderIdentity": other}});
    let writer = Holder::of(bound.clone());
    let refused = writer.create_lease(&serde_json::from_value(another).unwrap());
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("may not write"),
        "controllers write only their own Leases: {error}"
    );

    // Each Lease has its own leader, and the leader of one stands by for the other.
    hold(&bound, RESIZER_LEASE, &other).expect("a pod may write another Lease with its own name");
    let report = election.ask_who_leads(&leader).unwrap();
    let of_resizer = report.find(RESIZER_LEASE).expect("the report has both Leases");
    let blocks = [
        (&report[..of_resizer], &leader, &other),
        (&report[of_resizer..], &other, &leader),
    ];
    for (block, holder, idle) in blocks {
        for line in [
            &format!("holder           {holder}"),
            "verdict          it leads",
            &format!("stands by        {idle}"),
        ] {
            assert!(block.contains(line), "{line:?} is not in\n{block}\nof\n{report}");
        }
    }
    let metrics = election.lab.http(&election.lab.controllers()[0], "metrics").unwrap();
    let line = format!("hostdir_leader{{lease=\"{LEASE}\",holder=\"{leader}\"}} 1");
    assert!(metrics.contains(&line), "{line} is not in\n{metrics}");

    let without_policy = WithoutPolicy::begin(&election);
    election.replace_controllers();
    let pods = election.lab.live_controllers();
    election.lab.metrics_have(&pods[0], &["hostdir_lease_policy_missing 1"]);
    drop(without_policy);
    election.end();
}
