//! Reads and writes the Leases of the elections, and reads this controller's own Pod and Node.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;

use crate::k8s::client::{Problem, Refusal, request_within};
use crate::leader::{Election, Heartbeat, Own, View, identity};

/// How long to wait for the API server's answer: a later one is of no use to the election.
const LIMIT: Duration = Duration::from_secs(4);
/// The annotation of a Lease that says who took it from whom, and why.
pub(super) const HAND_OVER: &str = "hostdir.csi/hand-over";
/// The annotation of a heartbeat that says which Node its sender runs on.
const NODE: &str = "hostdir.csi/node";
/// The annotation of a heartbeat that says, for each election by the name of its Lease, why its sender could not lead, or `null`
/// if it could: a JSON object.
const ELECTIONS: &str = "hostdir.csi/elections";
/// Seconds after which others assume that a heartbeat has stopped: `leaseDurationSeconds` of its Lease.
const BEAT_TERM: i32 = 12;

/// What one look has read.
pub(super) struct Reading {
    pub(super) view: View,
    /// All Leases in the namespace.
    pub(super) leases: BTreeMap<String, Lease>,
}

/// This controller's Pod, as it was last seen.
#[derive(Clone)]
struct OwnPod {
    uid: String,
    node: String,
}

/// The elections in a namespace.
pub(super) struct Elections {
    leases: Api<Lease>,
    pods: Api<Pod>,
    nodes: Api<Node>,
    /// The Leases that leaders are elected by.
    names: Vec<String>,
    pod: String,
    own: Mutex<Option<OwnPod>>,
}

impl Elections {
    /// `pod` is the name of this controller's own Pod.
    pub(super) fn new(client: Client, namespace: &str, names: Vec<String>, pod: String) -> Self {
        Self {
            leases: Api::namespaced(client.clone(), namespace),
            pods: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client),
            names,
            pod,
            own: Mutex::default(),
        }
    }

    /// Reads the Leases, and this controller's own Pod and Node, as they are now.
    pub(super) async fn read(&self) -> Result<Reading, Problem> {
        let (mut reading, own) = tokio::try_join!(self.read_leases(), self.read_own())?;
        reading.view.own = own;
        Ok(reading)
    }

    /// Reads the Leases only.
    pub(super) async fn read_leases(&self) -> Result<Reading, Problem> {
        let leases = request_within(LIMIT, "list Leases", self.leases.list(&ListParams::default())).await?;
        let leases: BTreeMap<String, Lease> = leases.into_iter().map(|lease| (lease.name_any(), lease)).collect();
        let elections = self.names.iter().filter_map(|name| {
            let election = election(leases.get(name)?);
            Some((name.clone(), election))
        });
        let heartbeats = leases
            .iter()
            .filter_map(|(name, lease)| Some((identity(name), self.heartbeat_of(lease)?)));
        let view = View {
            elections: elections.collect(),
            heartbeats: heartbeats.collect(),
            own: Own::default(),
        };
        Ok(Reading { view, leases })
    }

    /// The heartbeat that a Lease is, if it is one.
    fn heartbeat_of(&self, lease: &Lease) -> Option<Heartbeat> {
        let annotations = lease.annotations();
        let elections = match annotations.get(ELECTIONS) {
            Some(elections) => serde_json::from_str(elections).ok()?,
            // Of a version that said no more than that it answers.
            None if lease.owner_references().iter().any(|owner| owner.kind == "Pod") => {
                self.names.iter().map(|name| (name.clone(), None)).collect()
            }
            None => return None,
        };
        Some(Heartbeat {
            sent: lease.spec.as_ref()?.renew_time.as_ref()?.0,
            node: annotations.get(NODE).cloned().unwrap_or_default(),
            elections,
        })
    }

    /// Reads both at once, or else a slow API server would take twice as long: a Pod never changes its Node.
    async fn read_own(&self) -> Result<Own, Problem> {
        let known = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (own, gone) = if let Some(known) = known {
            tokio::try_join!(self.read_own_pod(), self.is_gone(&known.node))?
        } else {
            let own = self.read_own_pod().await?;
            let gone = match &own {
                Some(own) => self.is_gone(&own.node).await?,
                None => false,
            };
            (own, gone)
        };
        Ok(own.map_or_else(Own::default, |own| Own {
            uid: Some(own.uid),
            node_gone: gone.then_some(own.node),
        }))
    }

    async fn is_gone(&self, node: &str) -> Result<bool, Problem> {
        let node = request_within(LIMIT, "read its own Node", self.nodes.get_metadata_opt(node));
        Ok(node.await?.is_none())
    }

    async fn read_own_pod(&self) -> Result<Option<OwnPod>, Problem> {
        let pod = request_within(LIMIT, "read its own Pod", self.pods.get_opt(&self.pod)).await?;
        let own = pod.and_then(|pod| {
            Some(OwnPod {
                uid: pod.uid()?,
                node: pod.spec?.node_name?,
            })
        });
        self.own.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&own);
        Ok(own)
    }

    /// Makes `me` the holder of a Lease, unless its holder has changed since it was `seen`. The Lease is read again for its
    /// version, because a ghost renews it every two seconds, and reading the rest from a slow API server takes longer.
    /// `note` is written on the Lease.
    pub(super) async fn hand_over(&self, seen: &Lease, me: &str, note: &str) -> Result<Lease, Problem> {
        let (name, verb) = (seen.name_any(), "hand over a Lease");
        let mut lease = request_within(LIMIT, verb, self.leases.get(&name)).await?;
        let (then, now) = (election(seen), election(&lease));
        if (then.holder, then.handed_over) != (now.holder, now.handed_over) {
            return Err(Problem::Conflict(verb));
        }
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(me.to_owned());
        spec.acquire_time = Some(now.clone());
        spec.renew_time = Some(now);
        // The duration stays: all sidecars rely on the one in the Lease (client-go, leaderelection.go).
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        lease.annotations_mut().insert(HAND_OVER.into(), note.to_owned());
        let params = PostParams::default();
        request_within(LIMIT, verb, self.leases.replace(&name, &params, &lease)).await
    }

    /// Writes a heartbeat of this controller, which says for each election why it could not lead, or `None` if it could. `last`
    /// is the Lease as the previous heartbeat returned it. The Lease is deleted with the Pod.
    pub(super) async fn beat(
        &self,
        elections: &BTreeMap<String, Option<String>>,
        last: Option<&Lease>,
    ) -> Result<Lease, Problem> {
        let verb = "write a heartbeat";
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let own = match own {
            Some(own) => Some(own),
            None => self.read_own_pod().await?,
        };
        // Without a Pod there is no heartbeat to send; the watchdog sees that, too.
        let own = own.ok_or(Problem::NotFound("read its own Pod"))?;
        let params = PostParams::default();
        let last = match last {
            Some(last) => Some(last.clone()),
            None => request_within(LIMIT, verb, self.leases.get_opt(&self.pod)).await?,
        };
        let is_new = last.is_none();
        let mut lease = last.unwrap_or_else(|| self.first_heartbeat(&own));
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(identity(&self.pod)),
            lease_duration_seconds: Some(BEAT_TERM),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        });
        let annotations = lease.annotations_mut();
        annotations.insert(NODE.into(), own.node);
        annotations.insert(ELECTIONS.into(), json!(elections).to_string());
        if is_new {
            request_within(LIMIT, verb, self.leases.create(&params, &lease)).await
        } else {
            request_within(LIMIT, verb, self.leases.replace(&self.pod, &params, &lease)).await
        }
    }

    /// Whether the admission policy for Leases is in force: whether the API server refuses that this controller writes another
    /// holder into its own heartbeat. Nothing is written.
    pub(super) async fn policy_is_in_force(&self, heartbeat: &Lease) -> Result<bool, Problem> {
        let mut lease = heartbeat.clone();
        lease.spec.get_or_insert_default().holder_identity = Some("not-this-pod".into());
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let verb = "ask whether the policy for Leases is in force";
        match request_within(LIMIT, verb, self.leases.replace(&self.pod, &params, &lease)).await {
            Ok(_) => Ok(false),
            Err(Problem::Refused(Refusal::Forbidden, _)) => Ok(true),
            Err(problem) => Err(problem),
        }
    }

    fn first_heartbeat(&self, own: &OwnPod) -> Lease {
        let owner = OwnerReference {
            api_version: "v1".into(),
            kind: "Pod".into(),
            name: self.pod.clone(),
            uid: own.uid.clone(),
            ..OwnerReference::default()
        };
        Lease {
            metadata: ObjectMeta {
                name: Some(self.pod.clone()),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            ..Lease::default()
        }
    }
}

/// What an election's Lease says.
pub(super) fn election(lease: &Lease) -> Election {
    let spec = lease.spec.clone().unwrap_or_default();
    Election {
        holder: spec.holder_identity.unwrap_or_default(),
        // client-go's own default.
        term: spec
            .lease_duration_seconds
            .and_then(|term| u64::try_from(term).ok())
            .unwrap_or(15),
        acquired: spec.acquire_time.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        renewal: spec.renew_time.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
        handed_over: lease.annotations().get(HAND_OVER).cloned(),
    }
}
