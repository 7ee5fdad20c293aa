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

/// The chart rendered with these settings, and each line of the result without its indentation.
fn lines(settings: &str) -> Vec<String> {
    let (text, sound) = helm(&["template", CHART, "--set-json", settings]);
    assert!(sound, "{settings}: {text}");
    text.lines().map(|line| line.trim().to_owned()).collect()
}

#[needs(Go)]
fn values_are_rendered_as_they_are_meant() {
    let large = r#"controller={"nodeGrace":1000000,"unusedAge":2000000},provisioner={"kubeApiBurst":3000000,"kubeApiCapacityBurst":4000000}"#;
    let id = "6b1f9a64-8d0e-4a3c-9a57-1f0a8c1d2e3f";
    let pools = format!(
        r#"pools=[{{"name":"123","path":"/a","poolId":"{id}"}},{{"name":"null","path":"/b"}}],storageClasses=[{{"name":"true","parameters":{{"pool":"123"}},"allowedTopologies":[{{"matchLabelExpressions":[{{"key":"topology.hostdir.csi/node","values":["node-1"]}}]}}]}}]"#
    );
    for (settings, wanted) in [
        (
            large,
            &[
                "- --node-grace=1000000",
                "- --unused-age=2000000",
                "- --kube-api-burst=3000000",
                "- --kube-api-capacity-burst=4000000",
            ][..],
        ),
        (
            &pools,
            &[
                "- name: \"123\"",
                "- name: \"null\"",
                "name: \"true\"",
                "pool: \"123\"",
                &format!("poolId: \"{id}\""),
                "allowedTopologies:",
            ],
        ),
        // The driver is privileged already.
        (
            "mode=\"elected\"",
            &[
                "- \"--http-endpoint=[::]:9808\"",
                "- --capacity-threads=8",
                "- --kube-api-capacity-qps=100",
            ],
        ),
    ] {
        let lines = lines(settings);
        for wanted in wanted {
            assert!(
                lines.iter().any(|line| line == wanted),
                "{settings}: no line {wanted:?} in {lines:#?}"
            );
        }
    }
    let privileged = |settings: &str| {
        lines(settings)
            .iter()
            .filter(|line| *line == "privileged: true")
            .count()
    };
    assert_eq!((privileged("selinux=false"), privileged("selinux=true")), (1, 2));
    assert_eq!(privileged(r#"selinux=true,mode="local",storageClasses=[]"#), 3);
}

/// kustomize changes the namespaces of objects and of the accounts in bindings, and no text.
#[needs(Go)]
fn no_policy_of_elected_mode_names_the_namespace() {
    let (text, _) = helm(&["template", "hostdir", CHART, "--namespace", "some-namespace"]);
    let policies = text
        .split("\n---\n")
        .filter(|object| object.contains("kind: ValidatingAdmissionPolicy\n"));
    let mut count = 0;
    for policy in policies {
        count += 1;
        assert!(!policy.contains("some-namespace"), "{policy}");
    }
    assert!(count >= 4, "only {count} policies");
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
