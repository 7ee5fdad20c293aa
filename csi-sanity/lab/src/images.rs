//! Images without a registry: one archive in the format of `docker save`, for `ctr images import`.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// An image: its name, what it runs, and the files in it.
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) entrypoint: &'static [&'static str],
    pub(crate) files: Vec<(PathBuf, &'static str)>,
    /// `busybox` applets, which become links to `busybox`.
    pub(crate) applets: &'static [&'static str],
}

/// Writes images into one archive.
pub(crate) fn archive(images: &[Image], path: &Path) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut archive = Builder::new(File::create(path).with_context(|| format!("create {}", path.display()))?);
    let mut manifest = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let layer = scratch.path().join(format!("layer{number}.tar"));
        write_layer(image, &layer)?;
        let digest = digest_of(&layer)?;
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Entrypoint": image.entrypoint, "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        let config_name = format!("config{number}.json");
        append(&mut archive, &config_name, config.to_string().as_bytes())?;
        let layer_name = format!("layer{number}.tar");
        archive.append_path_with_name(&layer, &layer_name)?;
        manifest.push(json!({"Config": config_name, "RepoTags": [image.name], "Layers": [layer_name]}));
    }
    append(
        &mut archive,
        "manifest.json",
        Value::from(manifest).to_string().as_bytes(),
    )?;
    archive.finish().context("finish the archive")
}

fn write_layer(image: &Image, path: &Path) -> Result<()> {
    let mut layer = Builder::new(File::create(path)?);
    for dir in ["bin", "tmp", "etc"] {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        layer.append_data(&mut header, format!("{dir}/"), std::io::empty())?;
    }
    for (from, to) in &image.files {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let mut header = Header::new_gnu();
        header.set_mode(fs::metadata(from)?.permissions().mode() & 0o777);
        header.set_size(bytes.len() as u64);
        layer.append_data(&mut header, to, bytes.as_slice())?;
    }
    for applet in image.applets {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    layer.finish().context("finish a layer")
}

fn append(archive: &mut Builder<File>, name: &str, bytes: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(bytes.len() as u64);
    archive
        .append_data(&mut header, name, bytes)
        .with_context(|| format!("write {name}"))
}

fn digest_of(path: &Path) -> Result<String> {
    let digest: [u8; 32] = Sha256::digest(fs::read(path)?).into();
    Ok(digest.map(|byte| format!("{byte:02x}")).concat())
}
