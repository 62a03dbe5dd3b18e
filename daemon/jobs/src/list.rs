//! [`Jobs`]: all jobs. Owned by the control task, the only one that changes their states.
//!
//! Of the jobs of one transaction (`group`) all are finalized or all are aborted. A job outside any is a transaction alone.

use crate::Job;
use crate::ctl::{JobCtl, Owner, Report, Shared, cancelled};
use crate::status::{accept, may_follow};
use block::Graph;
use qapi::opts::is_identifier;
use qapi::types::job::{
    BlockDeviceIoStatus, BlockJobInfo, BlockJobInfoMirror, BlockJobVariant, JobInfo, JobStatus, JobType, JobVerb,
};
use qapi::{Error, Result};
use std::sync::Arc;

/// What everybody is told about a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    /// It came to a state.
    Status {
        /// The job.
        id: String,
        /// Its state.
        status: JobStatus,
    },
}

/// How a job is started.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Its name.
    pub id: String,
    /// What it does.
    pub ty: JobType,
    /// It needs no `job-finalize`.
    pub auto_finalize: bool,
    /// It needs no `job-dismiss`.
    pub auto_dismiss: bool,
    /// Bytes a second at most; 0 is no limit.
    pub speed: u64,
    /// The transaction it belongs to, by a number of the caller's; none if it stands alone.
    pub group: Option<u64>,
}

/// Whether the older commands for block jobs know a job of that type.
pub fn is_block_job(ty: JobType) -> bool {
    matches!(ty, JobType::Commit | JobType::Stream | JobType::Mirror | JobType::Backup)
}

struct Entry {
    options: JobOptions,
    status: JobStatus,
    /// Told to rest by a user.
    paused: bool,
    /// Has ended: the job itself, until it is committed or aborted.
    job: Option<Box<dyn Job>>,
    completes: bool,
    error: Option<Error>,
    shared: Arc<Shared>,
}

/// See the module.
pub struct Jobs {
    /// Oldest first.
    list: Vec<Entry>,
    next: u64,
    tell: Box<dyn Fn(&JobEvent)>,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list.iter().map(|entry| (&entry.options.id, entry.status))).finish()
    }
}

impl Jobs {
    /// No jobs; `tell` is called with every event.
    pub fn new(tell: impl Fn(&JobEvent) + 'static) -> Self {
        Self { list: Vec::new(), next: 0, tell: Box::new(tell) }
    }

    /// Starts a job: gives its work, which the caller runs on a thread of its choice.
    ///
    /// # Errors
    /// Its name is none, or taken.
    pub fn start(
        &mut self,
        options: JobOptions,
        job: Box<dyn Job>,
        owner: Arc<dyn Owner>,
    ) -> Result<impl Future<Output = ()> + use<>> {
        let id = &options.id;
        if !is_identifier(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.list.iter().any(|entry| entry.options.id == *id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        let serial = self.next;
        self.next += 1;
        let shared = Arc::new(Shared::new(serial, Arc::clone(&owner), options.speed));
        self.list.push(Entry {
            options,
            status: JobStatus::Undefined,
            paused: false,
            completes: job.completes(),
            job: None,
            error: None,
            shared: Arc::clone(&shared),
        });
        self.to(serial, JobStatus::Created);
        self.to(serial, JobStatus::Running);
        Ok(async move {
            let mut job = job;
            let ctl = JobCtl { shared };
            let result = job.run(&ctl).await;
            owner.report(serial, Report::Ended(job, result));
        })
    }

    fn entry(&mut self, serial: u64) -> Option<&mut Entry> {
        self.list.iter_mut().find(|entry| entry.shared.serial == serial)
    }

    fn status(&self, serial: u64) -> Option<JobStatus> {
        self.list.iter().find(|entry| entry.shared.serial == serial).map(|entry| entry.status)
    }

    /// The one place where a state changes. What the table does not allow does not happen.
    fn to(&mut self, serial: u64, status: JobStatus) {
        let Some(entry) = self.entry(serial) else { return };
        let allowed = may_follow(entry.status, status);
        debug_assert!(allowed, "job '{}' cannot go from {} to {status}", entry.options.id, entry.status);
        if allowed {
            entry.status = status;
            let id = entry.options.id.clone();
            (self.tell)(&JobEvent::Status { id, status });
        }
    }

    /// Takes what the work of a job has to say. A job that is gone has nothing to say any more.
    pub async fn report(&mut self, graph: &mut Graph, serial: u64, report: Report) {
        match (report, self.status(serial)) {
            (Report::Paused, Some(JobStatus::Running)) => self.to(serial, JobStatus::Paused),
            (Report::Paused, Some(JobStatus::Ready)) => self.to(serial, JobStatus::Standby),
            (Report::Resumed, Some(JobStatus::Paused)) => self.to(serial, JobStatus::Running),
            (Report::Resumed, Some(JobStatus::Standby)) => self.to(serial, JobStatus::Ready),
            (Report::Ready, Some(JobStatus::Running)) => self.to(serial, JobStatus::Ready),
            (Report::Ended(job, result), Some(_)) => self.ended(graph, serial, job, result).await,
            _ => {}
        }
    }

    async fn ended(&mut self, graph: &mut Graph, serial: u64, job: Box<dyn Job>, result: Result<()>) {
        let Some(entry) = self.entry(serial) else { return };
        entry.job = Some(job);
        let result = match result {
            Ok(()) if entry.shared.lock().cancel => Err(cancelled()),
            other => other,
        };
        match result {
            Err(error) => self.fail(graph, serial, error).await,
            Ok(()) => {
                self.to(serial, JobStatus::Waiting);
                let group = self.group(serial);
                if group.iter().all(|one| self.status(*one) == Some(JobStatus::Waiting)) {
                    group.iter().for_each(|one| self.to(*one, JobStatus::Pending));
                    let auto = |jobs: &mut Self, one| jobs.entry(one).is_some_and(|entry| entry.options.auto_finalize);
                    if group.iter().all(|one| auto(self, *one)) {
                        self.finalize(graph, serial).await;
                    }
                }
            }
        }
    }

    /// The jobs of the same transaction that are not over.
    fn group(&mut self, serial: u64) -> Vec<u64> {
        let group = self.entry(serial).and_then(|entry| entry.options.group);
        if group.is_none() {
            return vec![serial];
        }
        let over = |status| matches!(status, JobStatus::Concluded | JobStatus::Null);
        let same = self.list.iter().filter(|entry| entry.options.group == group && !over(entry.status));
        same.map(|entry| entry.shared.serial).collect()
    }

    /// The job has failed, and with it all of its transaction: those that run are cancelled and come here in their turn.
    async fn fail(&mut self, graph: &mut Graph, serial: u64, error: Error) {
        let group = self.group(serial);
        if let Some(entry) = self.entry(serial) {
            entry.error = Some(error);
        }
        self.abort(graph, serial).await;
        for other in group.into_iter().filter(|other| *other != serial) {
            let Some(entry) = self.entry(other) else { continue };
            if entry.job.is_some() {
                entry.error = Some(cancelled());
                self.abort(graph, other).await;
            } else {
                Self::cancel_work(entry);
            }
        }
    }

    async fn abort(&mut self, graph: &mut Graph, serial: u64) {
        // A job that rests when its work ends has to go on first, by the table.
        match self.status(serial) {
            Some(JobStatus::Paused) => self.to(serial, JobStatus::Running),
            Some(JobStatus::Standby) => self.to(serial, JobStatus::Ready),
            _ => {}
        }
        self.to(serial, JobStatus::Aborting);
        if let Some(job) = self.entry(serial).and_then(|entry| entry.job.take()) {
            job.abort(graph).await;
        }
        self.conclude(serial);
    }

    /// All jobs of the transaction are pending: their results become real, or none of them.
    async fn finalize(&mut self, graph: &mut Graph, serial: u64) {
        let group = self.group(serial);
        for one in &group {
            let Some(mut job) = self.entry(*one).and_then(|entry| entry.job.take()) else { continue };
            let prepared = job.prepare(graph).await;
            if let Some(entry) = self.entry(*one) {
                entry.job = Some(job);
            }
            if let Err(error) = prepared {
                self.fail(graph, *one, error).await;
                return;
            }
        }
        for one in group {
            if let Some(job) = self.entry(one).and_then(|entry| entry.job.take()) {
                job.commit(graph).await;
            }
            self.conclude(one);
        }
    }

    fn conclude(&mut self, serial: u64) {
        self.to(serial, JobStatus::Concluded);
        if self.entry(serial).is_some_and(|entry| entry.options.auto_dismiss) {
            self.dismiss(serial);
        }
    }

    fn dismiss(&mut self, serial: u64) {
        self.to(serial, JobStatus::Null);
        self.list.retain(|entry| entry.shared.serial != serial);
    }

    fn cancel_work(entry: &mut Entry) {
        entry.paused = false;
        entry.shared.wish(|state| {
            state.cancel = true;
            state.pause = false;
        });
    }

    fn named(&mut self, id: &str, block_job: bool) -> Result<&mut Entry> {
        let found = self.list.iter_mut().find(|e| e.options.id == id && (!block_job || is_block_job(e.options.ty)));
        found.ok_or_else(|| {
            if block_job {
                Error::device_not_active(format!("Block job '{id}' not found"))
            } else {
                Error::generic("Job not found")
            }
        })
    }

    /// Carries out a verb that a user said. With `block_job` only block jobs are found, as by the older commands.
    ///
    /// # Errors
    /// No such job; the verb does not fit its state or the job itself.
    pub async fn verb(&mut self, graph: &mut Graph, id: &str, verb: JobVerb, block_job: bool) -> Result<()> {
        let entry = self.named(id, block_job)?;
        let (serial, status) = (entry.shared.serial, entry.status);
        if verb == JobVerb::Resume && !entry.paused {
            return Err(Error::generic("Can't resume a job that was not paused"));
        }
        accept(id, status, verb)?;
        match verb {
            JobVerb::Pause if entry.paused => return Err(Error::generic("Job is already paused")),
            JobVerb::Pause => {
                entry.paused = true;
                entry.shared.wish(|state| state.pause = true);
            }
            JobVerb::Resume => {
                entry.paused = false;
                entry.shared.wish(|state| state.pause = false);
            }
            JobVerb::Cancel if entry.job.is_some() => self.fail(graph, serial, cancelled()).await,
            JobVerb::Cancel => Self::cancel_work(entry),
            JobVerb::Complete if !entry.completes || entry.shared.lock().cancel => {
                return Err(Error::generic(format!("The active block job '{id}' cannot be completed")));
            }
            JobVerb::Complete => entry.shared.wish(|state| state.complete = true),
            JobVerb::Finalize => self.finalize(graph, serial).await,
            JobVerb::Dismiss => self.dismiss(serial),
            // These have arguments, and commands of their own.
            JobVerb::SetSpeed | JobVerb::Change => {}
        }
        Ok(())
    }

    /// Limits the speed of a block job, in bytes a second; 0 is no limit.
    ///
    /// # Errors
    /// No such job, it does not run any more, a negative speed.
    pub fn set_speed(&mut self, id: &str, speed: i64) -> Result<()> {
        let entry = self.named(id, true)?;
        accept(id, entry.status, JobVerb::SetSpeed)?;
        let speed =
            u64::try_from(speed).map_err(|_| Error::generic("Parameter 'speed' expects a non-negative value"))?;
        entry.shared.wish(|state| state.speed = speed);
        Ok(())
    }

    /// What `query-jobs` shows: the youngest first.
    pub fn infos(&self) -> Vec<JobInfo> {
        let signed = |units| i64::try_from(units).unwrap_or(i64::MAX);
        let info = |entry: &Entry| {
            let state = entry.shared.lock();
            JobInfo {
                id: entry.options.id.clone(),
                ty: entry.options.ty,
                status: entry.status,
                current_progress: signed(state.done),
                total_progress: signed(state.total),
                error: entry.error.as_ref().map(|error| error.desc.clone()),
            }
        };
        self.list.iter().rev().map(info).collect()
    }

    /// What `query-block-jobs` shows: the block jobs, the youngest first.
    pub fn block_infos(&self) -> Vec<BlockJobInfo> {
        let both = self.list.iter().rev().zip(self.infos());
        both.filter_map(|(entry, info)| {
            let job = match info.ty {
                JobType::Commit => BlockJobVariant::Commit,
                JobType::Stream => BlockJobVariant::Stream,
                JobType::Mirror => BlockJobVariant::Mirror(BlockJobInfoMirror::default()),
                JobType::Backup => BlockJobVariant::Backup,
                _ => return None,
            };
            Some(BlockJobInfo {
                job,
                device: info.id,
                len: info.total_progress,
                offset: info.current_progress,
                busy: matches!(entry.status, JobStatus::Running | JobStatus::Ready),
                paused: entry.paused,
                speed: i64::try_from(entry.shared.lock().speed).unwrap_or(i64::MAX),
                io_status: BlockDeviceIoStatus::Ok,
                ready: matches!(entry.status, JobStatus::Ready | JobStatus::Standby),
                status: info.status,
                auto_finalize: entry.options.auto_finalize,
                auto_dismiss: entry.options.auto_dismiss,
                error: info.error,
            })
        })
        .collect()
    }

    /// `block-job-cancel`: without `force` a job that is told to rest is not ended.
    ///
    /// # Errors
    /// No such job; it is over, or rests.
    pub async fn cancel_block_job(&mut self, graph: &mut Graph, id: &str, force: bool) -> Result<()> {
        if self.named(id, true)?.paused && !force {
            return Err(Error::generic(format!("The block job for device '{id}' is currently paused")));
        }
        self.verb(graph, id, JobVerb::Cancel, true).await
    }

    /// For the end of the process: all jobs are cancelled and need no user any more. Those whose work still runs report
    /// when it has ended; true when none is left.
    pub async fn end_all(&mut self, graph: &mut Graph) -> bool {
        for serial in self.list.iter().rev().map(|entry| entry.shared.serial).collect::<Vec<_>>() {
            let Some(entry) = self.entry(serial) else { continue };
            entry.options.auto_dismiss = true;
            match entry.status {
                JobStatus::Concluded => self.dismiss(serial),
                _ if entry.job.is_some() => self.fail(graph, serial, cancelled()).await,
                _ => Self::cancel_work(entry),
            }
        }
        self.list.is_empty()
    }
}
