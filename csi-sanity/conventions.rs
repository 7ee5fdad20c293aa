//! The order of the house: formatting, lints, documentation, who may know whom, and what the README says.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("read {name}: {error}"))
}

/// Runs cargo, which must find nothing to say.
fn cargo(args: &[&str]) {
    let output = Command::new(env!("CARGO"))
        .args(args)
        .current_dir(root())
        .env("RUSTDOCFLAGS", "-D warnings")
        .output()
        .expect("run cargo");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "cargo {}:\n{}{text}",
        args.join(" "),
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn the_code_is_formatted() {
    cargo(&["fmt", "--all", "--check"]);
}

#[test]
fn clippy_and_rustdoc_find_nothing() {
    cargo(&[
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]);
    cargo(&[
        "doc",
        "--locked",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ]);
}

/// All Rust files below a directory.
fn sources(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("list a directory") {
            let path = entry.expect("list a directory").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "nothing is in {dir}");
    found
}

/// Whether a file names a crate or module in code (comments do not count).
fn names(path: &Path, word: &str) -> bool {
    let text = fs::read_to_string(path).expect("read a source");
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .any(|line| {
            line.match_indices(word).any(|(at, _)| {
                let outside = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
                outside(line[..at].chars().next_back()) && outside(line[at + word.len()..].chars().next())
            })
        })
}

#[test]
fn dependencies_point_to_the_core_and_the_edges_never_meet() {
    let core = &[
        "tonic",
        "prost",
        "tokio",
        "kube",
        "nix",
        "libc",
        "crate::csi",
        "crate::linux",
        "crate::k8s",
        "crate::run",
    ];
    let rules: [(&str, &[&str]); 6] = [
        ("src/volume", core),
        ("src/leader", core),
        // What it decides depends on what it is told, and on no clock.
        ("src/leader", &["Instant", "SystemTime", "crate::volume"]),
        (
            "src/csi",
            &[
                "nix",
                "libc",
                "kube",
                "crate::linux",
                "crate::k8s",
                "crate::run",
                "crate::config",
            ],
        ),
        (
            "src/k8s",
            &[
                "tonic",
                "prost",
                "nix",
                "libc",
                "crate::csi",
                "crate::linux",
                "crate::run",
                "crate::config",
            ],
        ),
        (
            "src/linux",
            &[
                "tonic",
                "prost",
                "tokio",
                "kube",
                "crate::csi",
                "crate::k8s",
                "crate::run",
                "crate::config",
            ],
        ),
    ];
    for (dir, forbidden) in rules {
        for path in sources(dir) {
            for word in forbidden {
                assert!(
                    !names(&path, word),
                    "{} names {word}, which {dir} must not know",
                    path.display()
                );
            }
        }
    }
}

#[test]
fn unsafe_code_is_in_one_directory() {
    for path in sources("src") {
        assert!(
            path.starts_with(root().join("src/linux/sys")) || !names(&path, "unsafe"),
            "{} has unsafe code",
            path.display()
        );
    }
}

#[test]
fn the_readme_has_the_commands_that_ci_and_people_run() {
    let readme = read("README.md");
    let test = "cargo test --locked";
    assert!(
        readme.contains(test) && read(".ci/run").contains(test),
        "README and .ci/run run other tests"
    );
    for flag in [
        "--endpoint",
        "--pool",
        "--config",
        "--node-name",
        "--driver-name",
        "--http-endpoint",
        "--node-grace",
        "--unused-age",
        "--sidecar",
        "--namespace",
        "--controllers",
        "--log-level",
        "--log-format",
    ] {
        assert!(readme.contains(flag), "README does not explain {flag}");
    }
    for key in [
        "`pool`",
        "`mode`",
        "`uid`",
        "`gid`",
        "reserve",
        "overcommit",
        "requireMount",
        "quota",
        "projectIds",
        "inodesPerGiB",
    ] {
        assert!(readme.contains(key), "README does not explain {key}");
    }
}

#[test]
fn the_definitions_in_the_chart_are_those_of_the_binary() {
    let output = Command::new(env!("CARGO_BIN_EXE_hostdir"))
        .arg("crds")
        .output()
        .expect("run hostdir");
    let printed = String::from_utf8(output.stdout).expect("text");
    let path = "deploy/chart/files/crds.yaml";
    if std::env::var_os("HOSTDIR_RENDER").is_some() {
        fs::write(root().join(path), &printed).expect("write the definitions");
    }
    assert!(
        read(path) == printed,
        "{path} is not what `hostdir crds` prints; write it anew with HOSTDIR_RENDER=1"
    );
}

/// What a ghost would need: a token that is bound to no Pod, a name that is not its own, the right to delete a Lease.
#[test]
fn the_manifests_give_no_ghost_what_it_needs() {
    let manifests = read("deploy/hostdir.yaml");
    for word in ["service-account-token", "hostNetwork: true"] {
        assert!(!manifests.contains(word), "{word} is in deploy/hostdir.yaml");
    }
    let rule = manifests
        .split("resources: [leases]")
        .nth(1)
        .expect("a rule about Leases");
    let rights = rule.lines().find(|line| line.contains("verbs:")).expect("its verbs");
    assert_eq!(rights.trim(), "verbs: [get, list, watch, create, update]");
    assert!(manifests.contains("name: hostdir-leases"), "no policy for Leases");
}

#[test]
fn the_proto_file_is_the_one_of_the_specification() {
    use sha2::Digest;
    let proto = read("proto/csi.proto");
    let (pin, text) = proto.split_once('\n').expect("a first line");
    let digest: [u8; 32] = sha2::Sha256::digest(text.as_bytes()).into();
    let digest = digest.map(|byte| format!("{byte:02x}")).concat();
    assert!(
        pin.contains("v1.13.0") && pin.contains(&digest),
        "csi.proto was changed: {digest}"
    );
}
