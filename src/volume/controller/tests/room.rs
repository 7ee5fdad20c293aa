//! Room is never allocated twice.

use super::*;

#[test]
fn a_new_volume_counts_once_before_and_after_the_watch_shows_it() {
    let fixture = Fixture::new();
    fixture.create("a", 4, &[1]).unwrap();
    assert_eq!(fixture.room(1), 6);
    fixture.create("a", 4, &[1]).unwrap();
    assert_eq!(fixture.room(1), 6);
    fixture.watch();
    assert_eq!(fixture.room(1), 6);
    fixture.delete("a").unwrap();
    assert_eq!(fixture.room(1), 10);
    fixture.watch();
    assert_eq!(fixture.room(1), 10);
}

#[test]
fn concurrent_calls_never_allocate_more_than_the_room() {
    let fixture = Fixture::new();
    *fixture.store.gate.awaited.lock().unwrap() = 200;
    let created = std::thread::scope(|scope| {
        let create = |number| {
            let fixture = &fixture;
            scope.spawn(move || {
                let created = fixture.create(&format!("pvc-{number}"), 1, &[1]);
                if created.is_err() {
                    fixture.store.gate.arrive();
                }
                created.is_ok()
            })
        };
        let calls: Vec<_> = (0..200).map(create).collect();
        let created = calls.into_iter().map(|call| call.join().unwrap());
        created.filter(|created| *created).count()
    });
    assert_eq!((created, fixture.room(1)), (10, 0));
}

#[test]
fn room_is_given_back_when_the_api_server_refuses_a_volume() {
    let fixture = Fixture::new();
    fixture.store.refuses.store(true, Ordering::Relaxed);
    fixture.create("a", 6, &[1]).unwrap_err();
    assert_eq!(fixture.room(1), 10);
    fixture.store.refuses.store(false, Ordering::Relaxed);
    // Now it may have been created.
    fixture.store.loses_answers.store(true, Ordering::Relaxed);
    fixture.create("a", 6, &[1]).unwrap_err();
    fixture.store.loses_answers.store(false, Ordering::Relaxed);
    assert_eq!(fixture.room(1), 4);
    fixture.create("b", 6, &[1]).unwrap_err();
    fixture.create("a", 6, &[1]).unwrap();
    assert_eq!(fixture.room(1), 4);
}

#[test]
fn growth_and_creation_do_not_get_the_same_room() {
    let fixture = Fixture::new();
    fixture.create("a", 4, &[1]).unwrap();
    fixture.watch();
    let volume = fixture.store.get(&id("a")).unwrap().unwrap();
    let growth = fixture.cache.reserve_growth(&volume, Bytes(9 << 30)).unwrap();
    assert_eq!(fixture.room(1), 1);
    fixture.create("b", 2, &[1]).unwrap_err();
    let again = fixture.cache.reserve_growth(&volume, Bytes(9 << 30)).err();
    assert!(matches!(again, Some(Reason::Running(_))));
    drop(growth);
    assert_eq!(fixture.room(1), 6);
    fixture.create("b", 2, &[1]).unwrap();
    let size = request("a", 9, &[]).size;
    let refusal = fixture.controller.expand(&id("a"), size).unwrap_err();
    assert!(matches!(*refusal.reason, Reason::NoRoomToGrow { .. }), "{refusal}");
}

#[test]
fn a_volume_grows_as_far_as_there_is_room_and_never_shrinks() {
    let fixture = Fixture::new();
    fixture.create("a", 4, &[1]).unwrap();
    fixture.watch();
    let expand = |gib: u64, limit: Option<u64>| {
        let size = SizeRange {
            required: Bytes(gib << 30),
            limit: limit.map(|gib| Bytes(gib << 30)),
        };
        fixture.controller.expand(&id("a"), size).map_err(|error| *error.reason)
    };
    assert_eq!(expand(10, None).unwrap(), Bytes(10 << 30));
    fixture.watch();
    assert_eq!(fixture.room(1), 0);
    assert_eq!(
        expand(5, None).unwrap(),
        Bytes(10 << 30),
        "the volume is larger already"
    );
    let refusal = expand(11, None).unwrap_err();
    assert!(matches!(refusal, Reason::NoRoomToGrow { .. }), "{refusal}");
    let refusal = expand(4, Some(5)).unwrap_err();
    assert!(matches!(refusal, Reason::Shrink { .. }), "{refusal}");
}

#[test]
fn a_pool_that_was_replaced_has_no_room_while_volumes_are_on_the_old_one() {
    let fixture = Fixture::new();
    fixture.create("a", 1, &[1]).unwrap();
    fixture.store.change(&id("a"), |host_volume| {
        host_volume.phase = Phase::Ready;
        host_volume.made_on = Some(PoolId::random());
    });
    fixture.watch();
    assert_eq!(fixture.room(1), 0);
    let refusal = fixture.create("b", 1, &[1]).unwrap_err();
    assert!(refusal.to_string().contains("bring that disk back"), "{refusal}");
    fixture.store.entries.lock().unwrap().clear();
    fixture.watch();
    assert_eq!(fixture.room(1), 10);
}

#[test]
fn a_pool_that_nobody_has_is_told_from_one_that_is_full() {
    let fixture = Fixture::new();
    let fast = PoolName::parse("fast").unwrap();
    assert_eq!(fixture.controller.room(&fast, None).unwrap(), None);
    let unheard = node(7).segment();
    assert_eq!(
        fixture.controller.room(&fast, Some(&unheard)).unwrap(),
        Some(Bytes(0)),
        "nothing is known about that node yet"
    );
    fixture.cache.node_is_gone(&node(1));
    assert_eq!(fixture.room(1), 0, "the Node is gone");
}
