//! The two modes of hostdir, as the tests install them.

/// A mode of hostdir. Both modes are installed in one cluster, under two names.
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

    /// The name of the Helm release and of its StorageClass.
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

    /// The path of the pool on every node.
    pub(crate) fn pool(self) -> &'static str {
        match self {
            Self::Local => "/var/lib/hostdir-local",
            Self::Elected => "/var/lib/hostdir",
        }
    }

    /// The subcommand of `hostdir` that runs on nodes.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Elected => "node",
        }
    }

    /// The chart's settings that differ from the defaults.
    pub(crate) fn settings(self) -> &'static [&'static str] {
        match self {
            Self::Local => &[
                r#"mode="local""#,
                r#"driverName="local.hostdir.csi""#,
                r#"pools=[{"name":"default","path":"/var/lib/hostdir-local"}]"#,
                r#"storageClasses=[{"name":"hostdir-local"}]"#,
            ],
            // Short, so that tests need not wait five minutes.
            Self::Elected => &["controller.nodeGrace=10", "controller.unusedAge=15"],
        }
    }
}

/// Makes two tests of each scenario, one per mode.
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
