//! The chart: it lints, it refuses wrong values by name, a real API server takes it, and the plain manifests are its own.

use std::path::Path;
use std::process::Command;

use hostdir_cluster::cluster::{CHART, NAMESPACE};
use hostdir_cluster::tools;

use crate::lab::{Mode, lab, skipped};

/// Runs Helm without a cluster: what it prints, and whether it succeeded.
fn helm(helm: &Path, args: &[&str]) -> (String, bool) {
    let output = Command::new(helm)
        .args(args)
        .current_dir(tools::root())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}

#[test]
fn the_chart_lints_and_refuses_wrong_values_by_name() {
    let program = match tools::helm() {
        Ok(program) => program,
        Err(why) => return skipped("the_chart_lints", &format!("{why:#}")),
    };
    let (text, sound) = helm(&program, &["lint", "--strict", CHART]);
    assert!(sound, "{text}");
    for (setting, word) in [
        (r#"pools=[{"name":"a","path":"relative"}]"#, "path"),
        (r#"pools=[{"name":"a","path":"/a","pth":"/x"}]"#, "pth"),
        ("pools=[]", "pools"),
        (
            r#"pools=[{"name":"default","path":"/data","requireMount":true}]"#,
            "directly in /",
        ),
        (r#"logLevel="loud""#, "logLevel"),
        (r#"storageClasses=[{"name":"a","parameters":{"poool":"x"}}]"#, "poool"),
        (
            r#"storageClasses=[{"name":"a","parameters":{"pool":"fast"}}]"#,
            "\"fast\" is not among",
        ),
        (
            r#"storageClasses=[{"name":"a","mountOptions":["suid"]}]"#,
            "mountOptions",
        ),
        (r#"pools=[{"name":"a","path":"/a","quota":"always"}]"#, "quota"),
        (r#"pools=[{"name":"a","path":"/a","projectIds":"0-9"}]"#, "projectIds"),
        (
            r#"mode="local",storageClasses=[{"name":"a","allowVolumeExpansion":true}]"#,
            "needs mode=elected",
        ),
        (r#"image.digest="latest""#, "digest"),
        ("surprise=1", "surprise"),
    ] {
        let (text, sound) = helm(&program, &["template", CHART, "--set-json", setting]);
        assert!(!sound && text.contains(word), "{setting}: {text}");
    }
    let disks = r#"pools=[{"name":"default","path":"/mnt/a","requireMount":true},{"name":"b","path":"/mnt/b","requireMount":true}]"#;
    let (text, sound) = helm(&program, &["template", CHART, "--set-json", disks]);
    assert!(sound && text.matches("mountPath: /mnt\n").count() == 1, "{text}");
    // As YAML has it, without quotes.
    let off = r#"pools=[{"name":"default","path":"/a","quota":false,"inodesPerGiB":1000000}]"#;
    let (text, sound) = helm(&program, &["template", CHART, "--set-json", off]);
    assert!(
        sound && text.contains("quota: \"off\"") && text.contains("inodesPerGiB: 1000000\n"),
        "{text}"
    );
    let digest = format!("image.digest=\"sha256:{}\"", "0".repeat(64));
    let (text, _) = helm(&program, &["template", CHART, "--set-json", &digest]);
    assert!(text.contains("image: hostdir@sha256:000"), "a digest does not count");
}

#[test]
fn the_plain_manifests_are_those_of_the_chart() {
    let program = match tools::helm() {
        Ok(program) => program,
        Err(why) => return skipped("the_plain_manifests", &format!("{why:#}")),
    };
    let (rendered, sound) = helm(
        &program,
        &[
            "template",
            "hostdir",
            CHART,
            "--namespace",
            NAMESPACE,
            "--set",
            "installCRDs=false",
        ],
    );
    assert!(sound, "{rendered}");
    let path = tools::root().join("deploy/hostdir.yaml");
    let wanted = format!(
        "# Rendered from deploy/chart with its default values, for those without Helm:\n\
         #   kubectl create namespace {NAMESPACE}\n\
         #   kubectl apply -f deploy/chart/files/crds.yaml -f deploy/hostdir.yaml\n{rendered}"
    );
    if std::env::var_os("HOSTDIR_RENDER").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "deploy/hostdir.yaml is not what the chart renders; write it anew with HOSTDIR_RENDER=1"
    );
}

#[test]
fn an_api_server_takes_the_plain_manifests() {
    let Some(lab) = lab(Mode::Elected, "dry-run", "server-side dry run of the plain manifests") else {
        return;
    };
    let manifests = std::fs::read_to_string(tools::root().join("deploy/hostdir.yaml")).unwrap();
    let args = [
        "apply",
        "--server-side",
        "--dry-run=server",
        "--force-conflicts",
        "--validate=strict",
        "-f",
        "-",
    ];
    lab.kubectl().feed(&args, &manifests).unwrap();
}

#[test]
fn the_sidecar_may_do_what_it_needs_and_no_more() {
    let Some(lab) = lab(Mode::Local, "rbac", "least privilege of the service account") else {
        return;
    };
    let account = format!("system:serviceaccount:{NAMESPACE}:hostdir-local");
    let may = |args: &[&str]| {
        let args = [&["auth", "can-i", "--as", &account], args].concat();
        lab.kubectl().run(&args).is_ok_and(|answer| answer.trim() == "yes")
    };
    assert!(may(&["create", "persistentvolumes"]) && may(&["list", "persistentvolumeclaims", "-A"]));
    for forbidden in [
        &["get", "secrets", "-A"][..],
        &["create", "pods", "-A"],
        &["create", "pods/exec", "-A"],
        &["list", "nodes"],
        &["update", "nodes"],
        &["delete", "persistentvolumeclaims", "-A"],
        &["list", "pods", "-A"],
        &["create", "serviceaccounts/token", "-A"],
        &["create", "clusterrolebindings"],
        &["impersonate", "users"],
        &["delete", "csistoragecapacities", "-n", "default"],
    ] {
        assert!(!may(forbidden), "it may {}", forbidden.join(" "));
    }
}
