//! Snapshots, and what belongs to them: overlays, internal snapshots, names of backing files, transactions.

use crate::Qapi;

/// Puts an overlay that is there already above a node: all users of the node use the overlay from then on.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-snapshot", since = "2.5", feature = "allow-write-only-overlay")]
pub struct BlockdevSnapshot {
    /// The node.
    pub node: String,
    /// The node that goes above it. It must have no backing file and no user.
    pub overlay: String,
}

/// Whether an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum NewImageMode {
    /// It is there.
    Existing,
    /// It is made, and names its backing file by an absolute path.
    AbsolutePaths,
}

/// Makes an overlay in a new file and puts it above a node.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-snapshot-sync", since = "0.14")]
pub struct BlockdevSnapshotSync {
    /// The name of a device. There are none in this daemon, so that naming one alone always fails.
    pub device: Option<String>,
    /// The name of the node.
    #[qapi(since = "2.0")]
    pub node_name: Option<String>,
    /// The path of the new image.
    pub snapshot_file: String,
    /// The name of the new node.
    #[qapi(since = "2.0")]
    pub snapshot_node_name: Option<String>,
    /// The format of the new image; `qcow2` when left out.
    pub format: Option<String>,
    /// Whether the image is made; it is when left out.
    pub mode: Option<NewImageMode>,
}

/// Keeps the disk of a node as it is now, inside its image.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-snapshot-internal-sync", since = "1.7")]
pub struct BlockdevSnapshotInternalSync {
    /// The name of the node.
    pub device: String,
    /// The name of the snapshot.
    pub name: String,
}

/// A snapshot inside an image.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.3")]
pub struct SnapshotInfo {
    /// Its number, as a text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of a machine's state that are kept with it.
    pub vm_state_size: i64,
    /// When it was made: seconds since 1970.
    pub date_sec: i64,
    /// The rest of that time in nanoseconds.
    pub date_nsec: i64,
    /// The machine's clock then, in seconds.
    pub vm_clock_sec: i64,
    /// The rest of that clock in nanoseconds.
    pub vm_clock_nsec: i64,
    /// Instructions that the machine had carried out, if they were counted.
    #[qapi(since = "5.2")]
    pub icount: Option<i64>,
}

/// Deletes a snapshot inside an image; returns what it was.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "blockdev-snapshot-delete-internal-sync", returns = "SnapshotInfo", since = "1.7")]
pub struct BlockdevSnapshotDeleteInternalSync {
    /// The name of the node.
    pub device: String,
    /// The number of the snapshot; needed if there is no name.
    pub id: Option<String>,
    /// The name of the snapshot; needed if there is no number.
    pub name: Option<String>,
}

/// Nothing, and it fails: for tests of transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(since = "1.6")]
pub struct Abort {}

/// The data of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
pub struct AbortWrapper {
    /// Nothing.
    pub data: Abort,
}

/// The data of an action.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct BlockdevSnapshotWrapper {
    /// The arguments of the command.
    pub data: BlockdevSnapshot,
}

/// The data of an action.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct BlockdevSnapshotInternalSyncWrapper {
    /// The arguments of the command.
    pub data: BlockdevSnapshotInternalSync,
}

/// The data of an action.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct BlockdevSnapshotSyncWrapper {
    /// The arguments of the command.
    pub data: BlockdevSnapshotSync,
}

/// What can be part of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "TransactionActionKind")]
pub enum TransactionActionVariant {
    /// Fails, for tests.
    Abort(AbortWrapper),
    /// An overlay that is there.
    BlockdevSnapshot(BlockdevSnapshotWrapper),
    /// A snapshot inside an image.
    BlockdevSnapshotInternalSync(BlockdevSnapshotInternalSyncWrapper),
    /// An overlay in a new file.
    BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper),
}

/// A part of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.1")]
pub struct TransactionAction {
    /// What is done.
    #[qapi(variants, tag = "type")]
    pub action: TransactionActionVariant,
}

/// How the jobs of a transaction depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum ActionCompletionMode {
    /// Not at all.
    Individual,
    /// All succeed or none.
    Grouped,
}

/// Options of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(since = "2.5")]
pub struct TransactionProperties {
    /// How its jobs depend on each other; `individual` when left out.
    pub completion_mode: Option<ActionCompletionMode>,
}

/// Does several things at one point in time, all or none.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "transaction", since = "1.1")]
pub struct Transaction {
    /// What is done, in this order.
    pub actions: Vec<TransactionAction>,
    /// Options.
    #[qapi(since = "2.5")]
    pub properties: Option<TransactionProperties>,
}

/// Changes the name of the backing file that an image stores. Nothing is opened or moved.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "change-backing-file", since = "2.1")]
pub struct ChangeBackingFile {
    /// The node at the top of the chain.
    pub device: String,
    /// The node of the image, in that chain.
    pub image_node_name: String,
    /// The new name.
    pub backing_file: String,
}
