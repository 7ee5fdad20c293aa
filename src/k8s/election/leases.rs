//! Reads and writes the Leases, Pods and Nodes of the elections.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, ResourceExt};

use crate::k8s::client::{Problem, request_within};
use crate::leader::{ControllerPod, Election, NodeState, View, identity};

/// How long to wait for the API server's answer: a later one is of no use to the election.
const LIMIT: Duration = Duration::from_secs(4);
/// The annotation of a Lease that says who took it from whom, and why.
pub(super) const HAND_OVER: &str = "hostdir.csi/hand-over";
/// Seconds after which others may assume that a heartbeat has stopped: `leaseDurationSeconds` of its Lease.
const BEAT_TERM: i32 = 20;

/// What one look has read.
pub(super) struct Reading {
    pub(super) view: View,
    /// All Leases in the namespace.
    pub(super) leases: BTreeMap<String, Lease>,
}

/// The elections in a namespace.
pub(super) struct Elections {
    leases: Api<Lease>,
    pods: Api<Pod>,
    nodes: Api<Node>,
    /// The Leases that leaders are elected by.
    names: Vec<String>,
    /// The label selector of the controllers' Pods.
    selector: String,
    /// The Nodes that the controllers were on at the last look: read together with the Pods, or else a slow API server would
    /// take twice as long.
    known: Mutex<BTreeSet<String>>,
}

impl Elections {
    pub(super) fn new(client: Client, namespace: &str, names: Vec<String>, selector: String) -> Self {
        Self {
            leases: Api::namespaced(client.clone(), namespace),
            pods: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client),
            names,
            selector,
            known: Mutex::default(),
        }
    }

    /// Reads Leases, Pods and Nodes, as they are now.
    pub(super) async fn read(&self) -> Result<Reading, Problem> {
        let (leases, controllers) = tokio::try_join!(self.read_leases(), self.read_controllers())?;
        let elections = self.names.iter().filter_map(|name| {
            let election = election(leases.get(name)?);
            Some((name.clone(), election))
        });
        let heartbeats = leases.iter().filter_map(|(name, lease)| {
            let beat = lease.spec.as_ref()?.renew_time.as_ref()?;
            Some((identity(name), beat.0))
        });
        let view = View {
            elections: elections.collect(),
            controllers,
            heartbeats: heartbeats.collect(),
        };
        Ok(Reading { view, leases })
    }

    async fn read_leases(&self) -> Result<BTreeMap<String, Lease>, Problem> {
        let leases = request_within(LIMIT, "list Leases", self.leases.list(&ListParams::default())).await?;
        Ok(leases.into_iter().map(|lease| (lease.name_any(), lease)).collect())
    }

    async fn read_controllers(&self) -> Result<BTreeMap<String, ControllerPod>, Problem> {
        let params = ListParams::default().labels(&self.selector);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let pods = request_within(LIMIT, "list the controllers' Pods", self.pods.list(&params));
        let (pods, mut states) = tokio::try_join!(pods, self.node_states(known))?;
        let nodes: BTreeSet<String> = pods.items.iter().filter_map(node_of).collect();
        let others = nodes.iter().filter(|node| !states.contains_key(*node));
        states.extend(self.node_states(others.cloned().collect()).await?);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = nodes;
        // A Pod without a Node has not been scheduled, and has never led.
        let controllers = pods.into_iter().filter_map(|pod| {
            let node = node_of(&pod)?;
            let controller = ControllerPod {
                uid: pod.uid()?,
                ready: is_ready(&pod),
                ending: pod.metadata.deletion_timestamp.is_some(),
                node_state: states.get(&node).copied()?,
                node,
            };
            Some((identity(&pod.name_any()), controller))
        });
        Ok(controllers.collect())
    }

    async fn node_states(&self, nodes: BTreeSet<String>) -> Result<BTreeMap<String, NodeState>, Problem> {
        let states = nodes.into_iter().map(|node| async {
            let state = self.node_state(&node).await?;
            Ok::<_, Problem>((node, state))
        });
        Ok(try_join_all(states).await?.into_iter().collect())
    }

    async fn node_state(&self, node: &str) -> Result<NodeState, Problem> {
        match request_within(LIMIT, "read a Node", self.nodes.get(node)).await {
            Ok(node) => Ok(node_state(&node)),
            Err(Problem::NotFound(_)) => Ok(NodeState::Gone),
            Err(problem) => Err(problem),
        }
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

    /// Writes a heartbeat of a Pod. `last` is the Lease as the previous heartbeat returned it. The Lease is deleted with the
    /// Pod.
    pub(super) async fn beat(&self, pod: &str, uid: &str, last: Option<Lease>) -> Result<Lease, Problem> {
        let verb = "write a heartbeat";
        let params = PostParams::default();
        let last = match last {
            Some(last) => Some(last),
            None => request_within(LIMIT, verb, self.leases.get_opt(pod)).await?,
        };
        let Some(mut lease) = last else {
            let first = heartbeat(pod, uid);
            return request_within(LIMIT, verb, self.leases.create(&params, &first)).await;
        };
        lease.spec = Some(beat(pod));
        request_within(LIMIT, verb, self.leases.replace(pod, &params, &lease)).await
    }
}

fn beat(pod: &str) -> LeaseSpec {
    LeaseSpec {
        holder_identity: Some(identity(pod)),
        lease_duration_seconds: Some(BEAT_TERM),
        renew_time: Some(MicroTime(Timestamp::now())),
        ..LeaseSpec::default()
    }
}

fn heartbeat(pod: &str, uid: &str) -> Lease {
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Pod".into(),
        name: pod.into(),
        uid: uid.into(),
        ..OwnerReference::default()
    };
    Lease {
        metadata: ObjectMeta {
            name: Some(pod.into()),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(beat(pod)),
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

fn node_of(pod: &Pod) -> Option<String> {
    pod.spec.as_ref()?.node_name.clone()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn node_state(node: &Node) -> NodeState {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = |condition: &&k8s_openapi::api::core::v1::NodeCondition| {
        condition.type_ == "Ready" && condition.status == "True"
    };
    if conditions.into_iter().find(ready).is_some() {
        NodeState::Ready
    } else {
        NodeState::NotReady
    }
}
