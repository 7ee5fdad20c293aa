//! What a controller knows about Nodes: which exist, and which can be used.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::ClusterCache;
use super::state::{List, State};
use crate::volume::control::Topology;
use crate::volume::error::Reason;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::size::Bytes;

/// How long deletes do not wait for a node that another one has waited for in vain.
const SILENCE: Duration = Duration::from_mins(1);

/// How many refusals are named: a cluster may have a thousand nodes, and the first few show what is wrong.
const REFUSALS_MAX: usize = 5;

/// A Node, as far as it matters where volumes are created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeState {
    /// `status.conditions`: whether the kubelet says that the node is Ready.
    pub(crate) ready: bool,
    /// `spec.unschedulable`: kubectl-cordon(1).
    pub(crate) cordoned: bool,
    /// Whether a taint keeps pods away that do not tolerate it.
    pub(crate) tainted: bool,
}

impl ClusterCache {
    pub(crate) fn set_node(&self, node: NodeName, is: NodeState) {
        let mut state = self.lock();
        state.absent.remove(&node);
        state.nodes.insert(node, is);
    }

    pub(crate) fn node_is_gone(&self, node: &NodeName) {
        self.lock().nodes.remove(node);
    }

    /// A list of Nodes is complete: the others are gone.
    pub(crate) fn retain_nodes(&self, nodes: &BTreeSet<NodeName>) {
        let mut state = self.lock();
        state.nodes.retain(|node, _| nodes.contains(node));
        state.seen.insert(List::Nodes);
    }

    /// Sets on which nodes hostdir has a pod, and whether it is Ready. Before the first call, every node is believed to have one.
    pub(crate) fn set_agents(&self, agents: BTreeMap<NodeName, bool>) {
        self.lock().agents = Some(agents);
    }

    /// Whether there is little point in waiting for a node now: it is not Ready, or hostdir is not, or it did not answer lately.
    pub(in crate::volume::controller) fn is_silent(&self, node: &NodeName) -> bool {
        self.lock().is_silent(node)
    }

    /// A delete has waited for this node in vain.
    pub(in crate::volume::controller) fn note_silent(&self, node: &NodeName) {
        self.lock().silent.insert(node.clone(), Instant::now());
    }

    /// Notes which of the nodes that HostVolumes and HostNodes name do not exist, and since when. The queries below rely on
    /// this.
    pub(crate) fn note_absent(&self) {
        self.lock().note_absent();
    }

    /// Volumes that are being deleted and whose Node has not existed for `grace`.
    pub(crate) fn abandoned(&self, grace: Duration) -> Vec<VolumeId> {
        let state = self.lock();
        let volumes = state.volumes.iter();
        volumes
            .filter(|(_, cached)| cached.deleting && state.is_gone(&cached.place.node, grace))
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Whether a Node has not existed for `grace`.
    pub(crate) fn is_gone(&self, node: &NodeName, grace: Duration) -> bool {
        self.lock().is_gone(node, grace)
    }

    /// Nodes that have a HostNode and no volumes, and have not existed for `grace`.
    pub(crate) fn empty_absent_nodes(&self, grace: Duration) -> Vec<NodeName> {
        let state = self.lock();
        let used: BTreeSet<&NodeName> = state.volumes.values().map(|cached| &cached.place.node).collect();
        let published = state.pools.keys();
        published
            .filter(|node| state.is_gone(node, grace) && !used.contains(node))
            .cloned()
            .collect()
    }
}

/// A node that has room for a volume. The best comes first in order.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate<'a> {
    /// Its place among the preferred nodes.
    preferred: usize,
    tainted: bool,
    room: std::cmp::Reverse<Bytes>,
    node: &'a NodeName,
}

impl State {
    /// The node for a volume: the first preferred node that has room for it, else the node with the most room.
    ///
    /// Where the scheduler has not chosen the node (Immediate binding), nodes that no pod can use now are left out, and those
    /// with a taint come last: the pod cannot follow its volume there.
    pub(super) fn choose(&self, pool: &PoolName, bytes: Bytes, topology: &Topology) -> Result<NodeName, Reason> {
        let is_chosen = topology.requisite.as_ref().is_some_and(|nodes| nodes.len() == 1);
        let mut refusals = Vec::new();
        let mut candidates = Vec::new();
        for node in self.pools.keys().filter(|node| topology.admits(node)) {
            let usable = if is_chosen { Ok(()) } else { self.can_take_pods(node) };
            match usable.and_then(|()| self.room(node, pool)) {
                Ok(room) if room >= bytes => candidates.push(Candidate {
                    preferred: topology
                        .preferred
                        .iter()
                        .position(|wanted| *wanted == node.segment())
                        .unwrap_or(usize::MAX),
                    tainted: self.nodes.get(node).is_some_and(|is| is.tainted),
                    room: std::cmp::Reverse(room),
                    node,
                }),
                Ok(room) => refusals.push(format!(
                    "{bytes} do not fit in pool {pool} of node {node}, which has room for {room}"
                )),
                Err(why) => refusals.push(format!("node {node}: {why}")),
            }
        }
        match candidates.into_iter().min() {
            Some(best) => Ok(best.node.clone()),
            None => Err(self.no_node(topology, refusals)),
        }
    }

    fn can_take_pods(&self, node: &NodeName) -> Result<(), String> {
        let is = self.nodes.get(node).ok_or("the Node is no longer in the cluster")?;
        if !is.ready {
            return Err("the Node is not Ready".into());
        }
        if is.cordoned {
            return Err("the Node is cordoned".into());
        }
        match self.agent(node) {
            Some(true) => Ok(()),
            Some(false) => Err("hostdir's pod there is not Ready".into()),
            None => Err("hostdir has no pod there".into()),
        }
    }

    /// Whether hostdir's pod on a node is Ready; `None` if there is none.
    fn agent(&self, node: &NodeName) -> Option<bool> {
        let Some(agents) = &self.agents else { return Some(true) };
        agents.get(node).copied()
    }

    fn no_node(&self, topology: &Topology, mut refusals: Vec<String>) -> Reason {
        let unknown = topology.requisite.iter().flatten().filter(|segment| {
            let known = |node: &NodeName| node.segment() == **segment;
            !self.pools.keys().any(known)
        });
        refusals.extend(
            unknown.map(|segment| format!("node {segment}: hostdir has not published its pools; is it running there?")),
        );
        if refusals.is_empty() {
            refusals.push("no node has published its pools; are hostdir's node pods running?".into());
        }
        let more = refusals.len().saturating_sub(REFUSALS_MAX);
        refusals.truncate(REFUSALS_MAX);
        let more = if more > 0 {
            format!("; and {more} more nodes")
        } else {
            String::new()
        };
        Reason::NoNode(format!("{}{more}", refusals.join("; ")))
    }

    pub(super) fn is_silent(&self, node: &NodeName) -> bool {
        let unready = self.nodes.get(node).is_none_or(|is| !is.ready);
        let silent = self.silent.get(node).is_some_and(|since| since.elapsed() < SILENCE);
        unready || silent || self.agent(node) != Some(true)
    }

    fn is_gone(&self, node: &NodeName, grace: Duration) -> bool {
        self.absent.get(node).is_some_and(|since| since.elapsed() >= grace)
    }

    /// Notes since when nodes that are named by objects do not exist.
    fn note_absent(&mut self) {
        if !self.is_complete() {
            return;
        }
        let named = self
            .volumes
            .values()
            .map(|cached| &cached.place.node)
            .chain(self.pools.keys());
        let absent: BTreeSet<&NodeName> = named.filter(|node| !self.nodes.contains_key(*node)).collect();
        let mut since = BTreeMap::new();
        for node in absent {
            let first = self.absent.get(node).copied().unwrap_or_else(Instant::now);
            since.insert(node.clone(), first);
        }
        self.absent = since;
    }
}
