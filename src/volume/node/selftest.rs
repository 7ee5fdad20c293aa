//! The volumes of `hostdir selftest` on a node in elected mode. From the record to the mount they are like any other volume,
//! but they exist only on the node's disk, without a HostVolume. A node creates no other volumes on its own.

use std::sync::Arc;

use super::Node;
use crate::volume::control::{Control, CreateRequest, Volume};
use crate::volume::error::{Error, Reason};
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::size::{Bytes, SizeRange};

/// Creates and deletes the volumes of self-tests on a node, and no others.
pub(crate) struct SelfTest(pub(crate) Arc<Node>);

impl SelfTest {
    fn refuse(&self, id: Option<&VolumeId>) -> Error {
        self.0.error(id, Reason::NotOnNodes)
    }

    fn only_self_tests(&self, id: &VolumeId) -> Result<(), Error> {
        if id.is_of_self_test() {
            Ok(())
        } else {
            Err(self.refuse(Some(id)))
        }
    }
}

impl Control for SelfTest {
    fn create(&self, request: &CreateRequest) -> Result<Volume, Error> {
        self.only_self_tests(&VolumeId::for_name(&request.name))?;
        self.0.create(request)
    }

    fn delete(&self, id: &VolumeId) -> Result<(), Error> {
        self.only_self_tests(id)?;
        // A volume with a HostVolume does not belong to a self-test, whatever its name.
        if self.0.get(id).is_ok_and(|volume| volume.uid.is_some()) {
            return Err(self.refuse(Some(id)));
        }
        self.0.delete(id)
    }

    fn expand(&self, id: &VolumeId, _: SizeRange) -> Result<Bytes, Error> {
        Err(self.refuse(Some(id)))
    }

    fn expands_on_node(&self) -> bool {
        false
    }

    fn get(&self, id: &VolumeId) -> Result<Volume, Error> {
        Err(self.refuse(Some(id)))
    }

    fn list(&self, _: Option<&VolumeId>, _: usize) -> Result<Vec<Volume>, Error> {
        Err(self.refuse(None))
    }

    fn room(&self, pool: &PoolName, segment: Option<&str>) -> Result<Option<Bytes>, Error> {
        self.0.room(pool, segment)
    }

    fn filesystem(&self, pool: &PoolName) -> Option<String> {
        self.0.filesystem(pool)
    }
}
