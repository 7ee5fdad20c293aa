//! A node and a controller whose API server answers every request wrongly once, or dies with them: nothing is lost, doubled, left
//! behind or stuck.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use hostdir::csi::proto::Volume;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Process, Scratch, needs, wait_for};
use nix::unistd::Pid;
use serde_json::json;
use tonic::{Code, Status};

use crate::lab::{Lab, lab_alone, report};
use crate::mode::Mode;
use crate::pair::{on, publish};
use crate::proxy::{Lie, Proxy};

const LIES: [Lie; 9] = [
    Lie::Status(409),
    Lie::Status(410),
    Lie::Status(429),
    Lie::Status(500),
    Lie::Garbage,
    Lie::Silence,
    Lie::Lost,
    Lie::DiesBefore,
    Lie::DiesAfter,
];

/// How many lives go on at the same time: most of the time they wait.
const AT_ONCE: usize = 6;

/// How long a step of a life may take: some requests are answered after ten seconds.
const PATIENCE: Duration = Duration::from_mins(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Node,
    Controller,
}

/// A process that is started again when it dies.
struct Restarted {
    driver: Driver,
    process: Process,
    client: Client,
    deaths: usize,
}

impl Restarted {
    /// `started` is told of each process before that has asked anything.
    fn new(driver: Driver, started: impl Fn(Pid)) -> Self {
        let (process, client, deaths) = live(&driver, started);
        Self {
            driver,
            process,
            client,
            deaths,
        }
    }

    fn restart_if_dead(&mut self, started: impl Fn(Pid)) {
        if self.process.is_dead() {
            let deaths;
            (self.process, self.client, deaths) = live(&self.driver, started);
            self.deaths += 1 + deaths;
        }
    }
}

/// Starts a process until one lives long enough to answer. Returns how many died before.
fn live(driver: &Driver, started: impl Fn(Pid)) -> (Process, Client, usize) {
    let mut deaths = 0;
    let mut process = driver.spawn();
    started(process.pid());
    let mut client = None;
    wait_for(PATIENCE, "the process answers", || {
        if process.is_dead() {
            deaths += 1;
            process = driver.spawn();
            started(process.pid());
        }
        client = Client::connect(&driver.socket).ok();
        client.is_some()
    });
    (process, client.expect("the wait has set it"), deaths)
}

/// A volume's life on a node of its own.
struct Life<'a> {
    lab: &'a Lab,
    name: String,
    scratch: Scratch,
    victim: Victim,
    proxy: Proxy,
    node: Restarted,
    controller: Restarted,
}

impl<'a> Life<'a> {
    fn new(lab: &'a Lab, victim: Victim, lie: Lie) -> Self {
        let scratch = Scratch::new();
        let lie_name = format!("{lie:?}").to_lowercase().replace(['(', ')'], "");
        let name = format!("{victim:?}-{lie_name}").to_lowercase();
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        lab.kubectl().apply(&node.to_string()).unwrap();
        let proxy = Proxy::new(Path::new(&lab.kubeconfig), lie);
        proxy.write_kubeconfig(&scratch.path("kubeconfig"));
        let kubeconfig = |of: Victim| -> PathBuf {
            if of == victim {
                scratch.path("kubeconfig")
            } else {
                lab.kubeconfig.clone().into()
            }
        };
        let pool = format!("default={}", scratch.path("pool").display());
        let args = ["node", "--node-name", &name, "--pool", &pool];
        let node = Driver::with_args(&scratch.mkdir("node"), &args).kubeconfig(kubeconfig(Victim::Node));
        let controller = Driver::with_args(&scratch.mkdir("controller"), &["controller"]);
        let controller = controller.kubeconfig(kubeconfig(Victim::Controller));
        let started = |who: Victim| {
            let proxy = &proxy;
            move |pid| {
                if who == victim {
                    proxy.begin("start", pid);
                }
            }
        };
        let node = Restarted::new(node, started(Victim::Node));
        let controller = Restarted::new(controller, started(Victim::Controller));
        Self {
            lab,
            name,
            scratch,
            victim,
            proxy,
            node,
            controller,
        }
    }

    fn victim(&self) -> &Restarted {
        match self.victim {
            Victim::Node => &self.node,
            Victim::Controller => &self.controller,
        }
    }

    /// Lets the API server lie about what belongs to an act, which is tried until it succeeds.
    fn act<T>(&mut self, act: &'static str, mut work: impl FnMut(&Self) -> Result<T, Status>) -> T {
        self.proxy.begin(act, self.victim().process.pid());
        let start = Instant::now();
        loop {
            let status = match work(self) {
                Ok(value) => return value,
                Err(status) => status,
            };
            let name = &self.name;
            // A final answer must not be a guess.
            let guesses = [
                Code::NotFound,
                Code::AlreadyExists,
                Code::InvalidArgument,
                Code::OutOfRange,
            ];
            assert!(!guesses.contains(&status.code()), "{name}: {act}: {status}");
            assert!(start.elapsed() < PATIENCE, "{name}: {act}: {status}");
            let started = |pid| self.proxy.begin(act, pid);
            match self.victim {
                Victim::Node => self.node.restart_if_dead(started),
                Victim::Controller => self.controller.restart_if_dead(started),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn object(&self, id: &str) -> anyhow::Result<serde_json::Value> {
        self.lab.kubectl().get(&["hostvolume", id])
    }

    fn live(mut self) {
        let id = format!("pvc-{}", self.name);
        let target = self.scratch.path("target");
        let pool = self.scratch.path("pool");
        let (lab, name) = (self.lab, self.name.clone());
        self.act("start", |_| {
            let node = lab.kubectl().get(&["hostnode", &name]);
            let published = node.is_ok_and(|node| node["status"]["pools"][0]["free"].is_string());
            published
                .then_some(())
                .ok_or_else(|| Status::unavailable("not published"))
        });
        let volume: Volume = self.act("create", |life| life.controller.client.create_as(on(&name, &id)));
        self.act("publish", |life| publish(&life.node.client, &volume, &target));
        fs::write(target.join("file"), "precious").unwrap();
        self.act("become Ready", |life| {
            let ready = life
                .object(&id)
                .is_ok_and(|object| object["status"]["phase"] == "Ready");
            ready.then_some(()).ok_or_else(|| Status::unavailable("not Ready"))
        });
        self.act("grow", |life| life.controller.client.expand(&id, 20 << 20));
        self.act("grow on the node", |_| {
            let record = fs::read_to_string(pool.join(format!("volumes/{id}/volume.json"))).unwrap();
            record
                .contains("20971520")
                .then_some(())
                .ok_or_else(|| Status::unavailable("not grown"))
        });
        self.act("publish again", |life| {
            life.node.client.unpublish(&id, &target)?;
            publish(&life.node.client, &volume, &target)
        });
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "precious", "{name}");
        assert_eq!(names(pool.join("volumes")), [id.as_str()], "{name}");
        self.act("unpublish", |life| life.node.client.unpublish(&id, &target));
        self.act("delete", |life| life.controller.client.delete(&id));
        assert!(self.object(&id).is_err(), "{name}: its HostVolume is still there");
        assert_eq!(names(pool.join("volumes")), [""; 0], "{name}");
        let told = self.proxy.told();
        let deaths = self.victim().deaths;
        report(&format!(
            "{name}: {} requests answered wrongly, {deaths} deaths",
            told.len()
        ));
        // At least one in each act in which it asks at all.
        let acts = match self.victim {
            Victim::Node => ["start", "publish", "delete"],
            Victim::Controller => ["create", "grow", "delete"],
        };
        for act in acts {
            assert!(
                told.iter().any(|what| what.starts_with(act)),
                "{name}: nothing in {act}: {told:?}"
            );
        }
        if matches!(self.proxy.lie(), Lie::DiesBefore | Lie::DiesAfter) {
            assert!(deaths >= 3, "{name}: it died only {deaths} times");
        }
        drop((self.node, self.controller));
        for object in ["hostnode", "node"] {
            self.lab.kubectl().run(&["delete", object, &self.name]).unwrap();
        }
    }
}

#[needs(Root, Go, Cluster)]
fn whatever_the_api_server_answers_nothing_is_lost_doubled_or_stuck() {
    let lab = lab_alone(
        Mode::Elected,
        "lies",
        "every request is answered wrongly once, or is the last",
    );
    lab.join_network().unwrap();
    let of = |victim: Victim| LIES.map(|lie| (victim, lie));
    let mut lives = [of(Victim::Node), of(Victim::Controller)].concat();
    // The last ones begin first: silence takes longest.
    lives.sort_by_key(|(_, lie)| *lie == Lie::Silence);
    let lives = Mutex::new(lives);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some((victim, lie)) = lives.lock().unwrap().pop() else {
                        return;
                    };
                    Life::new(&lab, victim, lie).live();
                }
            });
        }
    });
    lab.wait("no HostVolume is left", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.is_empty())
    });
}
