//! Conventions that no lint checks: which module may use which, what the READMEs must say, and that generated files are
//! current.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("read {name}: {error}"))
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
    assert!(!found.is_empty(), "{dir} has no Rust files");
    found
}

/// The code of a file without comments, and with the paths of grouped imports spelled out: `use crate::{a::b, c}` adds
/// `crate::a::b` and `crate::c`.
fn code_in(text: &str) -> String {
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    let imports = code
        .split("use ")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once(';')?.0));
    let spelled: Vec<String> = imports.flat_map(|import| spell_out("", import)).collect();
    format!("{code}\n{}", spelled.join("\n"))
}

/// The paths of an import.
fn spell_out(prefix: &str, import: &str) -> Vec<String> {
    let Some((before, group)) = import.split_once('{') else {
        return vec![format!("{prefix}{}", import.trim())];
    };
    let prefix = format!("{prefix}{}", before.trim());
    let group = group.rsplit_once('}').map_or(group, |(group, _)| group);
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&group[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts.into_iter().flat_map(|part| spell_out(&prefix, part)).collect()
}

/// Whether code names a crate or module.
fn names(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let outside = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        outside(code[..at].chars().next_back()) && outside(code[at + word.len()..].chars().next())
    })
}

#[test]
fn grouped_imports_are_spelled_out() {
    let text = "// nix\nuse crate::{config, csi::{Endpoint, probe::Question}};\nuse tokio::time;";
    let code = code_in(text);
    for word in ["crate::csi", "crate::config", "crate::csi::probe", "tokio"] {
        assert!(names(&code, word), "{word} is not in {code}");
    }
    assert!(!names(&code, "nix") && !names(&code, "crate::probe"));
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
    let rules: [(&str, &[&str]); 7] = [
        ("src/volume", core),
        ("src/leader", core),
        // Its decisions depend on their arguments only, not on a clock.
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
        // Its threads have descriptors of their own, see `linux::threads`.
        ("src/linux", &["new_v4", "getrandom::fill"]),
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
            let source = code_in(&fs::read_to_string(&path).expect("read a source"));
            for word in forbidden {
                assert!(
                    !names(&source, word),
                    "{} uses {word}, which {dir} must not use",
                    path.display()
                );
            }
        }
    }
}

/// Our own harness does not run a `#[test]`.
#[test]
fn tests_of_the_lab_say_what_they_need() {
    for dir in [
        "csi-sanity/driver",
        "csi-sanity/quota",
        "csi-sanity/cluster",
        "csi-sanity/lab",
    ] {
        for path in sources(dir) {
            let text = fs::read_to_string(&path).expect("read a source");
            assert!(
                !text.contains("#[test]"),
                "{} has a #[test], which nothing runs: write #[needs()]",
                path.display()
            );
        }
    }
}

#[test]
fn unsafe_code_is_in_one_directory() {
    for path in sources("src") {
        let source = code_in(&fs::read_to_string(&path).expect("read a source"));
        assert!(
            path.starts_with(root().join("src/linux/sys")) || !names(&source, "unsafe"),
            "{} has unsafe code",
            path.display()
        );
    }
}

#[test]
fn the_readmes_have_the_commands_that_ci_and_people_run() {
    let readme = read("README.md");
    let words = readme.split_whitespace().count();
    assert!(
        words <= 1200,
        "README.md has {words} words, more than 1200: move what few people need to another file"
    );
    let test = "cargo test --locked";
    assert!(
        readme.contains(test) && read(".ci/run").contains(test),
        "README.md and .ci/run do not both contain `{test}`"
    );
    for (file, command) in [
        ("README.md", "cargo prove"),
        (".ci/run", "cargo prove rest"),
        ("csi-sanity/README.md", "cargo test --lib"),
        ("csi-sanity/README.md", "cargo prove prepare"),
    ] {
        assert!(read(file).contains(command), "{file} does not contain `{command}`");
    }
}

#[test]
fn links_between_the_readmes_lead_somewhere() {
    for file in ["README.md", "deploy/README.md", "csi-sanity/README.md"] {
        let text = read(file);
        let dir = Path::new(file).parent().expect("a file has a directory");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once(')')?.0))
        {
            if link.starts_with("https://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { file.into() } else { dir.join(path) };
            let target = read(&target.to_string_lossy());
            let headings = target.lines().filter_map(|line| line.strip_prefix('#'));
            let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#').trim()));
            assert!(
                heading.is_empty() || anchors.any(|anchor| anchor == heading),
                "{file} links to {link}, which does not exist"
            );
        }
    }
}

/// The anchor of a heading, as GitHub makes it: lower case, without punctuation, dashes for spaces.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// The parameters of a StorageClass and the keys of a pool's configuration, as the chart's schema lists them.
#[test]
fn every_parameter_and_every_key_of_a_pool_is_explained() {
    let readme = read("deploy/README.md");
    let schema: serde_json::Value = serde_json::from_str(&read("deploy/chart/values.schema.json")).expect("JSON");
    let keys = |pointer: &str| -> Vec<String> {
        let object = schema.pointer(pointer).and_then(serde_json::Value::as_object);
        let keys = object
            .unwrap_or_else(|| panic!("{pointer} is not in values.schema.json"))
            .keys();
        keys.cloned().collect()
    };
    for key in keys("/properties/storageClasses/items/properties/parameters/properties") {
        assert!(
            readme.contains(&format!("`{key}`")),
            "deploy/README.md does not explain the parameter {key}"
        );
    }
    for key in keys("/properties/pools/items/properties") {
        let line = |line: &str| line.trim_start_matches([' ', '-']).starts_with(&format!("{key}:"));
        assert!(
            readme.lines().any(line),
            "deploy/README.md does not show the key {key} of a pool"
        );
    }
}

#[test]
fn every_flag_has_its_help() {
    use clap::CommandFactory as _;
    let command = hostdir::config::Cli::command();
    for command in command.get_subcommands() {
        assert!(
            command.get_about().is_some(),
            "hostdir {}: no help text",
            command.get_name()
        );
        for flag in command.get_arguments() {
            assert!(
                flag.get_help().is_some(),
                "hostdir {} {}: no help text",
                command.get_name(),
                flag.get_id()
            );
        }
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
        "{path} differs from what `hostdir crds` prints; set HOSTDIR_RENDER=1 to write it again"
    );
}

/// With a token that is bound to no Pod, another Pod's host name, or the right to delete a Lease, a ghost could go on
/// leading.
#[test]
fn the_manifests_grant_no_unbound_token_and_no_delete_of_leases() {
    let manifests = read("deploy/hostdir.yaml");
    for word in ["service-account-token", "hostNetwork: true"] {
        assert!(!manifests.contains(word), "{word} is in deploy/hostdir.yaml");
    }
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(&manifests).expect("YAML");
    let all = documents
        .iter()
        .filter(|object| object["kind"].as_str().is_some_and(|kind| kind.ends_with("Role")));
    let rules: Vec<&serde_json::Value> = all.flat_map(|role| role["rules"].as_array().expect("rules")).collect();
    let about_leases = rules
        .iter()
        .filter(|rule| list(&rule["resources"]).contains(&"leases".into()));
    let mut count = 0;
    for rule in about_leases {
        count += 1;
        for verb in list(&rule["verbs"]) {
            let known = ["get", "list", "watch", "create", "update", "patch"].contains(&verb.as_str());
            assert!(known, "a Role allows {verb} on Leases: {rule}");
        }
    }
    assert!(count > 0, "deploy/hostdir.yaml has no rule about Leases");
    assert!(
        manifests.contains("name: hostdir-leases"),
        "deploy/hostdir.yaml has no policy for Leases"
    );
}

fn list(value: &serde_json::Value) -> Vec<String> {
    let texts = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(serde_json::Value::as_str);
    texts.map(str::to_owned).collect()
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
        "proto/csi.proto was changed: its SHA-256 is {digest}"
    );
}
