//! A node and a controller whose API server answers every request wrongly once, or dies with them: nothing is lost, doubled, left
//! behind or stuck.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use hostdir::csi::proto::Volume;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Process, Scratch, needs, wait_for};
use serde_json::json;
use tonic::{Code, Status};

use crate::lab::{Lab, lab, report};
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
struct Immortal {
    driver: Driver,
    process: Process,
    client: Client,
    deaths: usize,
}

impl Immortal {
    fn new(driver: Driver) -> Self {
        let mut process = driver.spawn();
        let client = process.connect();
        Self {
            driver,
            process,
            client,
            deaths: 0,
        }
    }

    /// Returns whether it had died.
    fn revive(&mut self) -> bool {
        if !self.process.is_dead() {
            return false;
        }
        self.deaths += 1;
        self.process = self.driver.spawn();
        self.client = self.process.connect();
        true
    }
}

/// A volume's life on a node of its own.
struct Life<'a> {
    lab: &'a Lab,
    name: String,
    scratch: Scratch,
    victim: Victim,
    proxy: Proxy,
    node: Immortal,
    controller: Immortal,
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
        Self {
            lab,
            name,
            victim,
            proxy,
            node: Immortal::new(node),
            controller: Immortal::new(controller),
            scratch,
        }
    }

    fn victim(&mut self) -> &mut Immortal {
        match self.victim {
            Victim::Node => &mut self.node,
            Victim::Controller => &mut self.controller,
        }
    }

    /// Lets the API server lie about what belongs to an act, which is tried until it succeeds.
    fn act<T>(&mut self, act: &'static str, mut work: impl FnMut(&Self) -> Result<T, Status>) -> T {
        let pid = self.victim().process.pid();
        self.proxy.begin(act, pid);
        let mut done = None;
        let mut refusals = Vec::new();
        let name = self.name.clone();
        wait_for(PATIENCE, &format!("{name}: {act}"), || {
            match work(self) {
                Ok(value) => done = Some(value),
                Err(status) => {
                    // A final answer must not be a guess.
                    let final_ = [
                        Code::NotFound,
                        Code::AlreadyExists,
                        Code::InvalidArgument,
                        Code::OutOfRange,
                    ];
                    assert!(!final_.contains(&status.code()), "{name}: {act}: {status}");
                    refusals.push(status.to_string());
                }
            }
            if self.victim().revive() {
                let pid = self.victim().process.pid();
                self.proxy.begin(act, pid);
            }
            if refusals.len() % 50 == 49 {
                report(&format!("{name}: {act}: {}", refusals.last().unwrap()));
            }
            done.is_some()
        });
        done.expect("the wait has set it")
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
    let lab = lab(
        Mode::Elected,
        "lies",
        "every request is answered wrongly once, or is the last",
    );
    lab.join_network().unwrap();
    let of = |victim: Victim| LIES.map(|lie| (victim, lie));
    let lives = Mutex::new([of(Victim::Node), of(Victim::Controller)].concat());
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
