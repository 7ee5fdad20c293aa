//! The two modes of hostdir, as the tests install them.

/// The two ways to run hostdir. Both are installed in the one cluster, under two names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Local,
    Elected,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Elected => "elected",
        }
    }

    /// The Helm release, and its StorageClass.
    pub(crate) fn release(self) -> &'static str {
        match self {
            Self::Local => "hostdir-local",
            Self::Elected => "hostdir",
        }
    }

    /// The name of the driver.
    pub(crate) fn driver(self) -> &'static str {
        match self {
            Self::Local => "local.hostdir.csi",
            Self::Elected => "hostdir.csi",
        }
    }

    /// A node's pool, from the node's root.
    pub(crate) fn pool(self) -> &'static str {
        match self {
            Self::Local => "/var/lib/hostdir-local",
            Self::Elected => "/var/lib/hostdir",
        }
    }

    /// What a driver on a node is called to run.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Elected => "node",
        }
    }

    /// What the chart is told beside its defaults.
    pub(crate) fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Local => &[
                r#"mode="local""#,
                r#"driverName="local.hostdir.csi""#,
                r#"pools=[{"name":"default","path":"/var/lib/hostdir-local"}]"#,
                r#"storageClasses=[{"name":"hostdir-local"}]"#,
            ],
            // Not for tests to wait five minutes.
            Self::Elected => &["controller.nodeGrace=10", "controller.unusedAge=15"],
        }
    }
}

/// Makes a test of a scenario for each mode.
macro_rules! in_both_modes {
    ($($scenario:ident),* $(,)?) => {
        mod local {
            $(#[hostdir_lab::needs(Root, Go, Cluster)] fn $scenario() { super::$scenario($crate::mode::Mode::Local); })*
        }
        mod elected {
            $(#[hostdir_lab::needs(Root, Go, Cluster)] fn $scenario() { super::$scenario($crate::mode::Mode::Elected); })*
        }
    };
}
pub(crate) use in_both_modes;
