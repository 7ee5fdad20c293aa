//! Tens of thousands of volumes leave nothing behind in the driver: neither memory, nor descriptors, nor threads.

use hostdir_lab::client::create_request;
use hostdir_lab::scene::start;
use hostdir_lab::scratch::{mounts_below, names};
use hostdir_lab::{Client, Csi, Driver, Mount, Process, Scratch, needs, wait_until};
use tonic::Status;

const CALLERS: usize = 16;

/// Volumes until the driver has all that it keeps, and in all. `HOSTDIR_SOAK` names another number: 50,000 take minutes, a million
/// a night.
const WARM: usize = 2_000;
const VOLUMES: usize = 8_000;

/// Threads that come and go with the calls.
const THREADS_MAX: usize = 128;

/// What the process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    mib: f64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn by(process: &Process) -> Self {
        Self {
            mib: process.memory().0,
            descriptors: process.descriptors(),
            threads: process.threads(),
        }
    }
}

#[needs(Root)]
fn many_volumes_leave_nothing_in_the_driver() {
    let all = std::env::var("HOSTDIR_SOAK").map_or(VOLUMES, |count| count.parse().expect("a number of volumes"));
    let scratch = Scratch::new();
    // Nothing is to be synced: this is about the driver.
    let pool = scratch.tmpfs("pool", "256m");
    scratch.mkdir("pods");
    let (process, client) = start(&Driver::new(&scratch).pool("default", &pool));
    live(&client, &scratch, 0..WARM);
    let before = Held::by(&process);
    live(&client, &scratch, WARM..all);
    wait_until("the trash is empty", || names(pool.join("trash")).is_empty());
    let after = Held::by(&process);
    println!("{WARM} volumes: {before:?}, {all}: {after:?}");
    assert!(
        after.mib < before.mib + 4.0 && after.descriptors <= before.descriptors + 8 && after.threads < THREADS_MAX,
        "{before:?} became {after:?}"
    );
    assert_eq!(names(pool.join("volumes")), [""; 0]);
    assert_eq!(
        mounts_below(&scratch.path("pods")),
        [""; 0].map(std::path::PathBuf::from)
    );
}

/// Takes volumes through their lives, with concurrent callers.
fn live(client: &Client, scratch: &Scratch, numbers: std::ops::Range<usize>) {
    client.block_on(async {
        let callers = (0..CALLERS).map(|caller| {
            let (csi, pods, numbers) = (client.csi().clone(), scratch.path("pods"), numbers.clone());
            tokio::spawn(async move {
                for number in numbers.skip(caller).step_by(CALLERS) {
                    let id = format!("soak-{number}");
                    let target = pods.join(&id).display().to_string();
                    cycle(&csi, &id, &target).await?;
                }
                Ok::<_, Status>(())
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("no panic").expect("each call succeeds");
        }
    });
}

async fn cycle(csi: &Csi, id: &str, target: &str) -> Result<(), Status> {
    csi.create(create_request(id)).await?;
    csi.publish(id, target, Mount::default()).await?;
    csi.stats(id, target).await?;
    csi.unpublish(id, target).await?;
    csi.delete(id).await
}
