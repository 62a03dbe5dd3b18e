//! Jobs: started, steered, shown.
//!
//! The states are the affair of [`jobs::Jobs`]. Here the work of a job gets its task, and its way back to the control task.

use super::{Control, Message};
use crate::events::Events;
use jobs::{CreateJob, GraphWork, Job, JobEvent, JobOptions, Jobs, Report};
use qapi::Result;
use qapi::types::create::BlockdevCreate;
use qapi::types::job::*;
use std::sync::Arc;

/// The way of jobs to the control task.
struct Owner(super::Handle);

impl jobs::Owner for Owner {
    fn work(&self, work: GraphWork) {
        self.0.send(Message::GraphWork(work));
    }

    fn report(&self, serial: u64, report: Report) {
        self.0.send(Message::JobReport(serial, report));
    }
}

/// No jobs, and everybody hears of them.
pub(super) fn none(events: &Events) -> Jobs {
    let events = events.clone();
    Jobs::new(move |event| match event {
        JobEvent::Status { id, status } => events.emit(&JobStatusChange { id: id.clone(), status: *status }),
    })
}

impl Control {
    /// Starts a job. Its work is a local task of this thread.
    fn start_job(&mut self, options: JobOptions, job: Box<dyn Job>) -> Result<()> {
        let work = self.jobs.start(options, job, Arc::new(Owner(self.handle())))?;
        tokio::task::spawn_local(work);
        Ok(())
    }

    pub(super) async fn job_report(&mut self, serial: u64, report: Report) {
        self.jobs.report(&mut self.graph, serial, report).await;
    }

    pub(super) async fn blockdev_create(&mut self, args: BlockdevCreate) -> Result<()> {
        let options = JobOptions {
            id: args.job_id,
            ty: JobType::Create,
            auto_finalize: true,
            auto_dismiss: false,
            speed: 0,
            group: None,
        };
        let job = CreateJob::new(args.options, self.graph.opener());
        self.start_job(options, Box::new(job))
    }

    pub(super) async fn query_jobs(&mut self, _: QueryJobs) -> Result<Vec<JobInfo>> {
        Ok(self.jobs.infos())
    }

    pub(super) async fn query_block_jobs(&mut self, _: QueryBlockJobs) -> Result<Vec<BlockJobInfo>> {
        Ok(self.jobs.block_infos())
    }

    async fn verb(&mut self, id: &str, verb: JobVerb) -> Result<()> {
        self.jobs.verb(&mut self.graph, id, verb, false).await
    }

    async fn block_verb(&mut self, id: &str, verb: JobVerb) -> Result<()> {
        self.jobs.verb(&mut self.graph, id, verb, true).await
    }

    pub(super) async fn job_pause(&mut self, args: JobPause) -> Result<()> {
        self.verb(&args.id, JobVerb::Pause).await
    }

    pub(super) async fn job_resume(&mut self, args: JobResume) -> Result<()> {
        self.verb(&args.id, JobVerb::Resume).await
    }

    pub(super) async fn job_cancel(&mut self, args: JobCancel) -> Result<()> {
        self.verb(&args.id, JobVerb::Cancel).await
    }

    pub(super) async fn job_complete(&mut self, args: JobComplete) -> Result<()> {
        self.verb(&args.id, JobVerb::Complete).await
    }

    pub(super) async fn job_finalize(&mut self, args: JobFinalize) -> Result<()> {
        self.verb(&args.id, JobVerb::Finalize).await
    }

    pub(super) async fn job_dismiss(&mut self, args: JobDismiss) -> Result<()> {
        self.verb(&args.id, JobVerb::Dismiss).await
    }

    pub(super) async fn block_job_pause(&mut self, args: BlockJobPause) -> Result<()> {
        self.block_verb(&args.device, JobVerb::Pause).await
    }

    pub(super) async fn block_job_resume(&mut self, args: BlockJobResume) -> Result<()> {
        self.block_verb(&args.device, JobVerb::Resume).await
    }

    pub(super) async fn block_job_cancel(&mut self, args: BlockJobCancel) -> Result<()> {
        self.jobs.cancel_block_job(&mut self.graph, &args.device, args.force == Some(true)).await
    }

    pub(super) async fn block_job_complete(&mut self, args: BlockJobComplete) -> Result<()> {
        self.block_verb(&args.device, JobVerb::Complete).await
    }

    pub(super) async fn block_job_finalize(&mut self, args: BlockJobFinalize) -> Result<()> {
        self.block_verb(&args.id, JobVerb::Finalize).await
    }

    pub(super) async fn block_job_dismiss(&mut self, args: BlockJobDismiss) -> Result<()> {
        self.block_verb(&args.id, JobVerb::Dismiss).await
    }

    pub(super) async fn block_job_set_speed(&mut self, args: BlockJobSetSpeed) -> Result<()> {
        self.jobs.set_speed(&args.device, args.speed)
    }

    /// Ends all jobs. Their work may still need the graph, and nothing else is served meanwhile.
    pub(super) async fn close_jobs(&mut self) {
        while !self.jobs.end_all(&mut self.graph).await {
            match self.inbox.recv().await {
                Some(Message::GraphWork(work)) => work.carry_out(&mut self.graph).await,
                Some(Message::JobReport(serial, report)) => self.job_report(serial, report).await,
                Some(Message::ExportClosed(id)) => self.export_closed(&id).await,
                Some(_) => {}
                None => return,
            }
        }
    }
}
