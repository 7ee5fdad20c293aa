//! The rendered chart: it lints, names the values that it refuses, and equals the plain manifests.

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use hostdir_lab::cluster::{CHART, NAMESPACE};
use hostdir_lab::needs;
use hostdir_lab::prove::{root, upstream};

/// Runs Helm without a cluster. Returns its output, and whether it succeeded.
fn helm(args: &[&str]) -> (String, bool) {
    static HELM: LazyLock<PathBuf> = LazyLock::new(|| upstream::helm().unwrap());
    let output = Command::new(&*HELM).args(args).current_dir(root()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}

#[needs(Go)]
fn the_chart_lints_and_refuses_wrong_values_naming_them() {
    let (text, sound) = helm(&["lint", "--strict", CHART]);
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
        let (text, sound) = helm(&["template", CHART, "--set-json", setting]);
        assert!(!sound && text.contains(word), "{setting}: {text}");
    }
    let disks = r#"pools=[{"name":"default","path":"/mnt/a","requireMount":true},{"name":"b","path":"/mnt/b","requireMount":true}]"#;
    let (text, sound) = helm(&["template", CHART, "--set-json", disks]);
    assert!(sound && text.matches("mountPath: /mnt\n").count() == 1, "{text}");
    let policy = r#"networkPolicy={"enabled":true,"from":[{"podSelector":{"matchLabels":{"app":"prometheus"}}}]}"#;
    let (text, sound) = helm(&["template", CHART, "--set-json", policy]);
    assert!(
        sound && text.contains("kind: NetworkPolicy") && text.contains("app: prometheus"),
        "{text}"
    );
    // Without quotes, YAML reads `off` as false.
    let off = r#"pools=[{"name":"default","path":"/a","quota":false,"inodesPerGiB":1000000}]"#;
    let (text, sound) = helm(&["template", CHART, "--set-json", off]);
    assert!(
        sound && text.contains("quota: \"off\"") && text.contains("inodesPerGiB: 1000000\n"),
        "{text}"
    );
    let digest = format!("image.digest=\"sha256:{}\"", "0".repeat(64));
    let (text, _) = helm(&["template", CHART, "--set-json", &digest]);
    assert!(
        text.contains("image: hostdir@sha256:000"),
        "the image has no digest: {text}"
    );
}

#[needs(Go)]
fn the_plain_manifests_are_those_of_the_chart() {
    let (rendered, sound) = helm(&[
        "template",
        "hostdir",
        CHART,
        "--namespace",
        NAMESPACE,
        "--set",
        "installCRDs=false",
    ]);
    assert!(sound, "{rendered}");
    let path = root().join("deploy/hostdir.yaml");
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
        "deploy/hostdir.yaml differs from what the chart renders; set HOSTDIR_RENDER=1 to write it again"
    );
}
