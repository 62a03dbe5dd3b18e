//! Jobs: what runs in the background, its states, and the commands that steer it.

use crate::Qapi;

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum JobType {
    /// Writes a layer of a chain into the one below.
    Commit,
    /// Copies from the layers below.
    Stream,
    /// Copies a node and keeps the copy current.
    Mirror,
    /// Copies a node as it is at one point in time.
    Backup,
    /// Makes an image.
    Create,
    /// Changes options of an image.
    Amend,
    /// Loads the state of a machine.
    SnapshotLoad,
    /// Saves the state of a machine.
    SnapshotSave,
    /// Deletes a saved state.
    SnapshotDelete,
}

/// Where a job is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum JobStatus {
    /// Not there yet.
    Undefined,
    /// There, and not started.
    Created,
    /// At work.
    Running,
    /// Told to rest.
    Paused,
    /// Ready to be completed, and keeping up meanwhile.
    Ready,
    /// Told to rest after it was ready.
    Standby,
    /// Done, and waiting for other jobs of its transaction.
    Waiting,
    /// Done, and waiting to be finalized.
    Pending,
    /// Failed or cancelled, and cleaning up.
    Aborting,
    /// Over, and waiting to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

/// What can be asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum JobVerb {
    /// End it without its work done.
    Cancel,
    /// Let it rest.
    Pause,
    /// Let it go on.
    Resume,
    /// Limit its speed.
    SetSpeed,
    /// Bring it to its end, if it has none of its own.
    Complete,
    /// Forget it.
    Dismiss,
    /// Make its results real.
    Finalize,
    /// Change its options.
    Change,
}

/// A job has come to another state.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "JOB_STATUS_CHANGE", since = "3.0")]
pub struct JobStatusChange {
    /// The name of the job.
    pub id: String,
    /// Its state now.
    pub status: JobStatus,
}

/// Lets a job rest at its next pause point.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-pause", since = "3.0")]
pub struct JobPause {
    /// The name of the job.
    pub id: String,
}

/// Lets a job go on that was told to rest.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-resume", since = "3.0")]
pub struct JobResume {
    /// The name of the job.
    pub id: String,
}

/// Ends a job as soon as possible, without its work done.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-cancel", since = "3.0")]
pub struct JobCancel {
    /// The name of the job.
    pub id: String,
}

/// Brings a job that is ready to its end.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-complete", since = "3.0")]
pub struct JobComplete {
    /// The name of the job.
    pub id: String,
}

/// Forgets a job that is over.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-dismiss", since = "3.0")]
pub struct JobDismiss {
    /// The name of the job.
    pub id: String,
}

/// Makes the results of a pending job real, and those of the other jobs of its transaction.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "job-finalize", since = "3.0")]
pub struct JobFinalize {
    /// The name of the job.
    pub id: String,
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "3.0")]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// What it does.
    #[qapi(rename = "type")]
    pub ty: JobType,
    /// Where it is in its life.
    pub status: JobStatus,
    /// What is done, in units of the job's own.
    pub current_progress: i64,
    /// What there is to do. May change while the job runs.
    pub total_progress: i64,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// Lists all jobs, the youngest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-jobs", returns = "Vec<JobInfo>", since = "3.0")]
pub struct QueryJobs;

/// Lets a block job rest.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-pause", since = "1.3")]
pub struct BlockJobPause {
    /// The name of the job.
    pub device: String,
}

/// Lets a block job go on.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-resume", since = "1.3")]
pub struct BlockJobResume {
    /// The name of the job.
    pub device: String,
}

/// Ends a block job. One that is ready ends in good order, unless `force` is given.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-cancel", since = "1.1")]
pub struct BlockJobCancel {
    /// The name of the job.
    pub device: String,
    /// Also one that is ready ends without its work done, and one that rests ends at all.
    #[qapi(since = "1.3")]
    pub force: Option<bool>,
}

/// Brings a block job that is ready to its end.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-complete", since = "1.3")]
pub struct BlockJobComplete {
    /// The name of the job.
    pub device: String,
}

/// Forgets a block job that is over.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-dismiss", since = "2.12")]
pub struct BlockJobDismiss {
    /// The name of the job.
    pub id: String,
}

/// Makes the results of a pending block job real.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-finalize", since = "2.12")]
pub struct BlockJobFinalize {
    /// The name of the job.
    pub id: String,
}

/// Limits the speed of a block job.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "block-job-set-speed", since = "1.1")]
pub struct BlockJobSetSpeed {
    /// The name of the job.
    pub device: String,
    /// Bytes a second; 0 is no limit.
    pub speed: i64,
}

/// What came of the last request of a job or a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum BlockDeviceIoStatus {
    /// It succeeded.
    Ok,
    /// It failed.
    Failed,
    /// It failed because there was no space.
    Nospace,
}

/// What a mirror shows besides.
#[derive(Debug, Clone, PartialEq, Eq, Default, Qapi)]
#[qapi(since = "8.2")]
pub struct BlockJobInfoMirror {
    /// The copy is kept the same by every write.
    pub actively_synced: bool,
}

/// What a block job does, with what it shows besides.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_type = "JobType")]
pub enum BlockJobVariant {
    /// Writes a layer of a chain into the one below.
    Commit,
    /// Copies from the layers below.
    Stream,
    /// Copies a node and keeps the copy current.
    Mirror(BlockJobInfoMirror),
    /// Copies a node as it is at one point in time.
    Backup,
}

/// A block job.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(since = "1.1")]
pub struct BlockJobInfo {
    /// What it does.
    #[qapi(variants, tag = "type")]
    pub job: BlockJobVariant,
    /// Its name.
    pub device: String,
    /// Bytes that there are to do. May change while the job runs.
    pub len: i64,
    /// Bytes of them that are done.
    pub offset: i64,
    /// It is doing something now.
    pub busy: bool,
    /// It rests.
    pub paused: bool,
    /// Bytes a second at most; 0 is no limit.
    pub speed: i64,
    /// What came of its last request.
    #[qapi(since = "1.3")]
    pub io_status: BlockDeviceIoStatus,
    /// It can be completed.
    #[qapi(since = "2.2")]
    pub ready: bool,
    /// Where it is in its life.
    #[qapi(since = "2.12")]
    pub status: JobStatus,
    /// It needs no `job-finalize`.
    #[qapi(since = "2.12")]
    pub auto_finalize: bool,
    /// It needs no `job-dismiss`.
    #[qapi(since = "2.12")]
    pub auto_dismiss: bool,
    /// Why it failed, if it did.
    #[qapi(since = "2.12.1")]
    pub error: Option<String>,
}

/// Lists the block jobs: those that copy data between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-block-jobs", returns = "Vec<BlockJobInfo>", since = "1.1")]
pub struct QueryBlockJobs;
