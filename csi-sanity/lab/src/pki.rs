//! Certificates, keys, tokens and kubeconfigs of one cluster.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::json;

/// The certificate authority of a cluster, and where its files are.
pub(crate) struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// The users of the API server besides nodes: token, user, group.
const USERS: [(&str, &str, &str); 3] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
];

impl Pki {
    /// Makes a certificate authority, and the certificates, keys and tokens of the control plane.
    pub(crate) fn new(dir: &Path, server: &[IpAddr], nodes: &[String]) -> Result<Self> {
        fs::create_dir_all(dir).context("make the directory of keys")?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "hostdir-lab");
        let certificate = params.self_signed(&key)?;
        fs::write(dir.join("ca.crt"), certificate.pem())?;
        let pki = Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
        };

        pki.sign("apiserver", "kube-apiserver", None, server)?;
        pki.sign(
            "apiserver-kubelet",
            "kube-apiserver-kubelet",
            Some("system:masters"),
            &[],
        )?;
        let service_accounts = KeyPair::generate()?;
        fs::write(dir.join("sa.key"), service_accounts.serialize_pem())?;
        fs::write(dir.join("sa.pub"), service_accounts.public_key_pem())?;
        let users = USERS
            .iter()
            .map(|(token, user, group)| format!("{token},{user},{user},\"{group}\"\n"));
        let nodes = nodes
            .iter()
            .map(|node| format!("{node},system:node:{node},{node},\"system:nodes\"\n"));
        fs::write(dir.join("tokens.csv"), users.chain(nodes).collect::<String>())?;
        Ok(pki)
    }

    /// The path of a file in the authority's directory.
    pub(crate) fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    /// Makes `<name>.crt` and `<name>.key`, for a server at these addresses and for a client.
    pub(crate) fn sign(&self, name: &str, common_name: &str, group: Option<&str>, addresses: &[IpAddr]) -> Result<()> {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params
            .subject_alt_names
            .extend(addresses.iter().copied().map(SanType::IpAddress));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::write(self.dir.join(format!("{name}.crt")), certificate.pem())?;
        fs::write(self.dir.join(format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }

    /// Writes a kubeconfig for the user of this token. Returns its path.
    pub(crate) fn kubeconfig(&self, token: &str, server: &str) -> Result<String> {
        let name = "lab";
        // A kubeconfig is YAML, and JSON is valid YAML.
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority": self.path("ca.crt")}}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        });
        let path = self.path(&format!("{token}.kubeconfig"));
        fs::write(&path, config.to_string()).context("write a kubeconfig")?;
        Ok(path)
    }
}
