//! The verbs on a machine in memory that fails when it is told to.

use super::super::control::{Control, Health, Parameters, Placement, Want};
use super::super::memory::Memory;
use super::super::ports::{DiskErrorKind, OnDisk, Stage, Usage};
use super::super::quota::{Policy, Quotas};
use super::super::record::Directory;
use super::super::room::Limits;
use super::super::size::SizeRange;
use super::*;

struct Fixture {
    memory: Memory,
    driver: Driver,
}

fn pool(name: &str) -> PoolName {
    PoolName::parse(name).unwrap()
}

fn id(text: &str) -> VolumeId {
    VolumeId::parse(text).unwrap()
}

fn target(path: &str) -> TargetPath {
    TargetPath::parse(path).unwrap()
}

fn want(name: &str, gib: u64) -> Want {
    Want {
        name: name.into(),
        size: SizeRange {
            required: Bytes(gib << 30),
            limit: None,
        },
        parameters: Parameters::default(),
        claim: None,
        placement: Placement::default(),
    }
}

fn publish(volume: &str, path: &str, mode: AccessMode) -> Publish {
    Publish {
        id: id(volume),
        target: target(path),
        mode,
        options: MountOptions::default(),
        made_on: None,
        uid: None,
    }
}

impl Fixture {
    /// Pools `default` and `other`, 10 GiB each.
    fn new() -> Self {
        Self::on(Memory::default())
    }

    fn on(memory: Memory) -> Self {
        Self::with_ledger(memory, Arc::new(OnDisk))
    }

    fn with_ledger(memory: Memory, ledger: Arc<dyn Ledger>) -> Self {
        let config = |name: &str| PoolConfig {
            name: pool(name),
            path: format!("/{name}").into(),
            require_mount: false,
            expected: None,
            limits: Limits::default(),
            quotas: Quotas::default(),
        };
        let node = NodeName::parse("node-a").unwrap();
        let driver = Driver::new(
            node,
            Arc::new(memory.clone()),
            ledger,
            vec![config("default"), config("other")],
        );
        Self { memory, driver }
    }

    fn restarted(self) -> Self {
        Self::on(self.memory)
    }

    fn used(&self, volume: &str) {
        self.driver.create(&want(volume, 1)).unwrap();
        self.driver
            .publish(&publish(volume, "/t", AccessMode::SingleNodeWriter))
            .unwrap();
        self.driver.unpublish(&id(volume), &target("/t")).unwrap();
    }

    fn room(&self) -> u64 {
        self.driver.room(&pool("default"), None).unwrap().0 >> 30
    }
}

#[test]
fn verbs_may_be_repeated() {
    let Fixture { driver, .. } = Fixture::new();
    let made = driver.create(&want("a", 1)).unwrap();
    assert_eq!(driver.create(&want("a", 1)).unwrap(), made);
    for _ in 0..2 {
        driver
            .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
            .unwrap();
    }
    for _ in 0..2 {
        driver.unpublish(&id("a"), &target("/t")).unwrap();
    }
    for _ in 0..2 {
        driver.delete(&id("a")).unwrap();
    }
}

#[test]
fn a_claim_that_failed_leaves_no_promise() {
    let fixture = Fixture::new();
    fixture.memory.fail("claim", DiskErrorKind::Failed);
    fixture.driver.create(&want("a", 4)).unwrap_err();
    assert_eq!(fixture.room(), 10);
    fixture.driver.create(&want("a", 4)).unwrap();
    assert_eq!(fixture.room(), 6);
}

#[test]
fn a_claim_that_took_effect_unsettled_counts_and_is_found_again() {
    let fixture = Fixture::new();
    fixture.memory.fail("claim", DiskErrorKind::Unsettled);
    let error = fixture.driver.create(&want("a", 4)).unwrap_err();
    assert!(matches!(*error.reason, Reason::Disk(ref disk) if disk.kind == DiskErrorKind::Unsettled));
    assert_eq!(fixture.room(), 6);
    fixture.driver.create(&want("a", 4)).unwrap();
    assert_eq!(fixture.room(), 6, "counted twice");
}

#[test]
fn a_delete_that_failed_deletes_nothing_and_one_unsettled_is_done() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.memory.fail("discard", DiskErrorKind::Failed);
    fixture.driver.delete(&id("a")).unwrap_err();
    assert!(fixture.memory.has(&pool("default"), &id("a")) && fixture.driver.get(&id("a")).is_ok());
    fixture.memory.fail("discard", DiskErrorKind::Unsettled);
    fixture.driver.delete(&id("a")).unwrap_err();
    assert!(!fixture.memory.has(&pool("default"), &id("a")) && fixture.driver.get(&id("a")).is_err());
    assert_eq!(fixture.room(), 10);
    fixture.driver.delete(&id("a")).unwrap();
}

#[test]
fn a_first_publish_that_failed_is_still_a_first_publish() {
    let fixture = Fixture::new();
    fixture.driver.create(&want("a", 1)).unwrap();
    let first = publish("a", "/t", AccessMode::SingleNodeWriter);
    for kind in [DiskErrorKind::Failed, DiskErrorKind::Full, DiskErrorKind::Unsettled] {
        fixture.memory.fail("prepare", kind);
        fixture.driver.publish(&first).unwrap_err();
    }
    fixture.driver.publish(&first).unwrap();
}

#[test]
fn a_used_volume_without_its_directory_is_never_published_empty() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.memory.lose_directory(&pool("default"), &id("a"));
    let fixture = fixture.restarted();
    let error = fixture
        .driver
        .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
        .unwrap_err();
    assert!(matches!(*error.reason, Reason::DataMissing { .. }), "{error}");
}

#[test]
fn what_may_be_on_an_absent_disk_is_not_said_to_be_gone() {
    let fixture = Fixture::new();
    fixture.used("a");
    fixture.memory.set_absent(&pool("default"), true);
    for error in [
        fixture.driver.delete(&id("a")).unwrap_err(),
        fixture.driver.delete(&id("never-made")).unwrap_err(),
        fixture.driver.create(&want("b", 1)).unwrap_err(),
        fixture.driver.get(&id("a")).unwrap_err(),
    ] {
        assert!(matches!(*error.reason, Reason::PoolUnusable { .. }), "{error}");
    }
    assert_eq!(fixture.room(), 0);
    fixture
        .driver
        .unpublish(&id("a"), &target("/t"))
        .expect("a pod must be able to end");
    fixture.memory.set_absent(&pool("default"), false);
    fixture.driver.delete(&id("a")).unwrap();
}

#[test]
fn a_pool_that_was_absent_at_start_is_opened_when_it_is_there() {
    let memory = Memory::default();
    memory.set_absent(&pool("default"), true);
    let fixture = Fixture::on(memory);
    let error = fixture.driver.probe(true).unwrap_err().to_string();
    assert!(
        error.contains("pool default") && !error.contains("pool other"),
        "{error}"
    );
    fixture.driver.probe(false).expect("one pool is fine");
    fixture.memory.set_absent(&pool("other"), true);
    fixture.driver.probe(false).expect_err("no pool is fine");
    fixture.memory.set_absent(&pool("other"), false);
    fixture.memory.set_absent(&pool("default"), false);
    fixture.driver.probe(true).unwrap();
    fixture.driver.create(&want("a", 1)).unwrap();
}

#[test]
fn a_volume_on_two_pools_is_touched_by_nobody() {
    let fixture = Fixture::new();
    fixture.used("a");
    let (held, _) = fixture.driver.inventory();
    fixture.memory.put(&pool("other"), held[0].record.clone().unwrap());
    let fixture = fixture.restarted();
    for error in [
        fixture.driver.delete(&id("a")).unwrap_err(),
        fixture.driver.get(&id("a")).unwrap_err(),
    ] {
        assert!(matches!(*error.reason, Reason::Ambiguous(..)), "{error}");
    }
    assert!(fixture.memory.has(&pool("default"), &id("a")) && fixture.memory.has(&pool("other"), &id("a")));
}

#[test]
fn what_cannot_be_told_is_taken_for_mounted() {
    let fixture = Fixture::new();
    fixture.driver.create(&want("a", 1)).unwrap();
    fixture
        .driver
        .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
        .unwrap();
    fixture.memory.hide_mounts();
    let error = fixture.driver.delete(&id("a")).unwrap_err();
    assert!(matches!(*error.reason, Reason::Mounted(_)), "{error}");
}

#[test]
fn lists_go_by_id_over_all_pools() {
    let fixture = Fixture::new();
    for (name, pool_name) in [("c", "default"), ("a", "other"), ("b", "default"), ("d", "other")] {
        let parameters = Parameters {
            pool: pool(pool_name),
            ..Parameters::default()
        };
        fixture
            .driver
            .create(&Want {
                parameters,
                ..want(name, 1)
            })
            .unwrap();
    }
    let list = |after: Option<&str>, max| {
        let volumes = fixture.driver.list(after.map(id).as_ref(), max).unwrap();
        volumes.iter().map(|volume| volume.id.to_string()).collect::<String>()
    };
    assert_eq!(list(None, 10), "abcd");
    assert_eq!(list(None, 3), "abc");
    assert_eq!(list(Some("b"), 3), "cd");
    assert_eq!(list(Some("d"), 3), "");
}

#[test]
fn errors_say_which_volume_and_which_node() {
    let Fixture { driver, .. } = Fixture::new();
    let error = driver.create(&want("a", 100)).unwrap_err().to_string();
    assert_eq!(
        error,
        "volume a on node node-a: 100 GiB do not fit in pool default: 10 GiB are left to promise; \
         delete volumes there, ask for less, or let the pod go to another node"
    );
}

#[test]
fn a_volume_grows_as_far_as_there_is_room_or_not_at_all() {
    let fixture = Fixture::new();
    fixture.driver.create(&want("a", 4)).unwrap();
    let expand = |gib: u64| {
        let size = SizeRange {
            required: Bytes(gib << 30),
            limit: None,
        };
        fixture.driver.expand(&id("a"), size).map_err(|error| *error.reason)
    };
    fixture.memory.fail("rewrite", DiskErrorKind::Failed);
    expand(6).unwrap_err();
    assert_eq!(fixture.room(), 6, "what failed counts");
    assert_eq!(expand(6).unwrap(), Bytes(6 << 30));
    assert_eq!(fixture.room(), 4);
    assert_eq!(expand(5).unwrap(), Bytes(6 << 30));
    let refusal = expand(11).unwrap_err();
    assert!(
        matches!(refusal, Reason::NoRoomToGrow { room, .. } if room == Bytes(10 << 30)),
        "{refusal}"
    );
    let fixture = fixture.restarted();
    assert_eq!(fixture.driver.get(&id("a")).unwrap().bytes, Bytes(6 << 30));
}

/// A ledger in memory.
#[derive(Default)]
struct Promises(std::sync::Mutex<std::collections::HashMap<VolumeId, Promise>>);

impl Promises {
    fn make(&self, name: &str) -> Promise {
        let promise = Promise {
            id: id(name),
            uid: Uuid::new_v4(),
            version: "1".into(),
            name: name.into(),
            claim: None,
            node: NodeName::parse("node-a").unwrap(),
            pool: pool("default"),
            bytes: Bytes::GIB,
            directory: Directory::default(),
            stage: Stage::Claimed,
            made_on: None,
            hindrance: None,
            deleting: false,
            holders: Vec::new(),
            created: Timestamp::UNIX_EPOCH,
        };
        self.0.lock().unwrap().insert(id(name), promise.clone());
        promise
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Promise)) {
        change(self.0.lock().unwrap().get_mut(&id(name)).unwrap());
    }
}

impl Ledger for Promises {
    fn promise(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        Ok(self.0.lock().unwrap().get(id).cloned())
    }

    fn look_up(&self, id: &VolumeId) -> Result<Option<Promise>, Reason> {
        self.promise(id)
    }

    fn keep(&self, record: &Record) -> Result<(), Reason> {
        let mut promises = self.0.lock().unwrap();
        let promise = promises.get_mut(&record.id).ok_or(Reason::NoSuchVolume)?;
        if promise.deleting {
            return Err(Reason::Deleting);
        }
        promise.stage = Stage::Ready;
        promise.made_on = Some(record.pool_id);
        Ok(())
    }
}

/// A node in elected mode, and a way to publish a promise of it at `/t`.
struct Elected {
    promises: Arc<Promises>,
    fixture: Fixture,
}

impl Elected {
    fn new() -> Self {
        let promises = Arc::new(Promises::default());
        let fixture = Fixture::with_ledger(Memory::default(), Arc::clone(&promises) as _);
        Self { promises, fixture }
    }

    fn restarted(self) -> Self {
        let fixture = Fixture::with_ledger(self.fixture.memory, Arc::clone(&self.promises) as _);
        Self { fixture, ..self }
    }

    fn publish(&self, name: &str, uid: Uuid) -> Result<(), Reason> {
        let wanted = Publish {
            uid: Some(uid),
            ..publish(name, "/t", AccessMode::SingleNodeWriter)
        };
        self.fixture.driver.publish(&wanted).map_err(|error| *error.reason)
    }

    fn unpublish(&self, name: &str) {
        self.fixture.driver.unpublish(&id(name), &target("/t")).unwrap();
    }
}

#[test]
fn a_promise_is_made_and_marked_when_a_pod_first_uses_it() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.publish("a", promise.uid).unwrap();
    let marked = node.promises.promise(&id("a")).unwrap().unwrap();
    assert_eq!(marked.stage, Stage::Ready);
    node.unpublish("a");
    // From here on the disk will do: the ledger need not answer.
    node.promises.0.lock().unwrap().clear();
    node.publish("a", promise.uid).unwrap();
}

#[test]
fn a_volume_that_cannot_be_marked_has_no_data() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.promises.change("a", |promise| promise.deleting = true);
    assert!(matches!(node.publish("a", promise.uid), Err(Reason::Deleting)));
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
    node.promises.0.lock().unwrap().clear();
    assert!(matches!(node.publish("a", promise.uid), Err(Reason::NoSuchVolume)));
}

#[test]
fn a_crash_between_mark_and_directory_is_made_good() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.fixture.memory.fail("prepare", DiskErrorKind::Failed);
    node.publish("a", promise.uid).unwrap_err();
    assert_eq!(
        node.promises.promise(&id("a")).unwrap().unwrap().stage,
        Stage::Ready,
        "marked before there is a directory"
    );
    let node = node.restarted();
    node.publish("a", promise.uid).unwrap();
}

#[test]
fn a_volume_that_was_ready_elsewhere_is_never_made_anew() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    let lost = PoolId::random();
    node.promises.change("a", |promise| {
        promise.stage = Stage::Ready;
        promise.made_on = Some(lost);
    });
    let refusal = node.publish("a", promise.uid).unwrap_err();
    assert!(matches!(refusal, Reason::DataMissing { .. }), "{refusal}");
    assert!(refusal.to_string().contains(&lost.to_string()), "{refusal}");
    node.fixture.memory.set_absent(&pool("other"), true);
    let refusal = node.publish("a", promise.uid).unwrap_err();
    assert!(
        matches!(refusal, Reason::PoolUnusable { .. }),
        "it may be there: {refusal}"
    );
}

#[test]
fn the_data_of_an_earlier_volume_is_neither_mounted_nor_deleted() {
    let node = Elected::new();
    let first = node.promises.make("a");
    node.publish("a", first.uid).unwrap();
    node.unpublish("a");
    let second = node.promises.make("a");
    let refusal = node.publish("a", second.uid).unwrap_err();
    assert!(matches!(refusal, Reason::Predecessor { .. }), "{refusal}");
    node.fixture.driver.delete_of(&id("a"), second.uid).unwrap();
    assert!(node.fixture.memory.has(&pool("default"), &id("a")), "not asked for");
    node.fixture.driver.delete_of(&id("a"), first.uid).unwrap();
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
    node.publish("a", second.uid).unwrap();
}

#[test]
fn a_promise_that_is_another_than_the_one_asked_for_gives_no_empty_volume() {
    let node = Elected::new();
    let first = node.promises.make("a");
    node.promises.make("a");
    let refusal = node.publish("a", first.uid).unwrap_err();
    assert!(matches!(refusal, Reason::Successor { .. }), "{refusal}");
    assert!(!node.fixture.memory.has(&pool("default"), &id("a")));
}

#[test]
fn what_an_earlier_promise_left_unused_is_in_nobodys_way() {
    let node = Elected::new();
    let first = node.promises.make("a");
    node.fixture.memory.fail("prepare", DiskErrorKind::Failed);
    node.publish("a", first.uid).unwrap_err();
    let second = node.promises.make("a");
    node.publish("a", second.uid).unwrap();
}

#[test]
fn a_promise_of_another_node_is_refused() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.promises
        .change("a", |promise| promise.node = NodeName::parse("node-b").unwrap());
    assert!(matches!(node.publish("a", promise.uid), Err(Reason::OtherNode)));
}

/// A driver with one pool of which quotas are required.
fn required(memory: &Memory) -> Driver {
    let config = PoolConfig {
        name: pool("default"),
        path: "/default".into(),
        require_mount: false,
        expected: None,
        limits: Limits::default(),
        quotas: Quotas {
            policy: Policy::Required,
            ..Quotas::default()
        },
    };
    let node = NodeName::parse("node-a").unwrap();
    Driver::new(node, Arc::new(memory.clone()), Arc::new(OnDisk), vec![config])
}

#[test]
fn where_quotas_are_required_nothing_is_mounted_without() {
    let memory = Memory::default();
    let driver = required(&memory);
    driver.create(&want("a", 1)).unwrap();
    let mount = |path: &str| driver.publish(&publish("a", path, AccessMode::SingleNodeMultiWriter));
    assert!(matches!(*mount("/t").unwrap_err().reason, Reason::Unlimited { .. }));
    memory.enforce(true);
    mount("/t").unwrap();
    // One that others do not share its fate with.
    memory.let_loose(&id("a"), "it was made without");
    let refusal = mount("/u").unwrap_err().to_string();
    assert!(refusal.contains("it was made without"), "{refusal}");
    assert_eq!(driver.pool_states()[0].condition.as_ref().unwrap().unlimited, 1);
    // What runs, ends.
    driver.unpublish(&id("a"), &target("/t")).unwrap();
    driver.delete(&id("a")).unwrap();
    assert_eq!(driver.pool_states()[0].condition.as_ref().unwrap().unlimited, 0);
}

#[test]
fn statistics_are_those_of_the_volume() {
    let Fixture { memory, driver } = Fixture::new();
    driver.create(&want("a", 2)).unwrap();
    driver
        .publish(&publish("a", "/t", AccessMode::SingleNodeWriter))
        .unwrap();
    let refusal = driver.stats(&id("a"), "/t").unwrap_err();
    assert!(matches!(*refusal.reason, Reason::Waiting(_)), "{refusal}");
    let mut usage = Usage {
        bytes: Bytes(1 << 30),
        inodes: None,
    };
    memory.set_usage(Some(usage));
    let stats = driver.stats(&id("a"), "/t").unwrap();
    assert_eq!(
        (stats.total, stats.used, stats.available),
        (Bytes(2 << 30), Bytes(1 << 30), Bytes(1 << 30))
    );
    // Where nothing holds it, it may have more than was promised.
    usage.bytes = Bytes(3 << 30);
    memory.set_usage(Some(usage));
    let stats = driver.stats(&id("a"), "/t").unwrap();
    assert_eq!((stats.used, stats.available), (Bytes(3 << 30), Bytes(0)));
}

#[test]
fn a_node_lets_a_volume_have_what_was_promised_and_no_more() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.publish("a", promise.uid).unwrap();
    let driver = &node.fixture.driver;
    let at_least = |gib: u64| SizeRange {
        required: Bytes(gib << 30),
        limit: None,
    };
    let refusal = driver.expand_here(&id("a"), at_least(2)).unwrap_err();
    assert!(matches!(*refusal.reason, Reason::NotPromised { .. }), "{refusal}");
    node.promises.change("a", |promise| promise.bytes = Bytes(3 << 30));
    // Whoever asks for less has an old idea of what is promised.
    assert_eq!(driver.expand_here(&id("a"), at_least(2)).unwrap(), Bytes(3 << 30));
    assert_eq!(driver.get(&id("a")).unwrap().bytes, Bytes(3 << 30));
    let promised = driver.pool_states()[0].condition.as_ref().unwrap().promised;
    assert_eq!(promised, Bytes(3 << 30));
    // Another volume of that name is not this one.
    assert!(driver.follow_promise(&id("a"), Uuid::new_v4(), Bytes(9 << 30)).is_err());
    assert_eq!(
        driver.follow_promise(&id("a"), promise.uid, Bytes(1 << 30)).unwrap(),
        Bytes(3 << 30)
    );
}

#[test]
fn an_expansion_that_the_disk_refuses_is_promised_to_nobody() {
    let node = Elected::new();
    let promise = node.promises.make("a");
    node.publish("a", promise.uid).unwrap();
    node.promises.change("a", |promise| promise.bytes = Bytes(3 << 30));
    let driver = &node.fixture.driver;
    node.fixture.memory.fail("rewrite", DiskErrorKind::Failed);
    driver
        .follow_promise(&id("a"), promise.uid, Bytes(3 << 30))
        .unwrap_err();
    let promised = || driver.pool_states()[0].condition.as_ref().unwrap().promised;
    assert_eq!(promised(), Bytes::GIB);
    driver.follow_promise(&id("a"), promise.uid, Bytes(3 << 30)).unwrap();
    assert_eq!(promised(), Bytes(3 << 30));
}
