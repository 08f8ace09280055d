// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/mace: the calls of user space. See uapi/mace.h for what they mean.
 *
 * Everything that comes from user space is checked here or in mace_session_setup(). Structures are
 * copied in whole, worked on and copied out whole: nobody can change them in between, and no
 * kernel memory but theirs leaves.
 */
#include <linux/fs.h>
#include <linux/jiffies.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/random.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "mace_chardev.h"
#include "mace_compat.h"
#include "mace_probes.h"
#include "mace_session.h"

#define MACE_CALL_MS 10

static u64 mace_load_id;

static int mace_open(struct inode *inode, struct file *file)
{
	struct mace_session *session = mace_session_open();

	if (IS_ERR(session))
		return PTR_ERR(session);
	file->private_data = session;
	return nonseekable_open(inode, file);
}

static int mace_release(struct inode *inode, struct file *file)
{
	mace_session_close(file->private_data);
	return 0;
}

static __poll_t mace_poll(struct file *file, poll_table *wait)
{
	struct mace_session *session = file->private_data;

	poll_wait(file, &session->wait, wait);
	return (mace_session_readable(session) ? EPOLLIN | EPOLLRDNORM : 0) |
	       (READ_ONCE(session->gone) ? EPOLLHUP : 0);
}

/*
 * By page frame: before v5.11 vm_insert_page() refuses pages that are charged to a memory cgroup
 * (Linux kernel commit bcfe06bf2622 ("mm: memcontrol: Use helpers to read page's memcg data")). The
 * mapping holds no references to pages; it keeps the file open, and the session the pages.
 */
static int mace_map(struct vm_area_struct *vma, const struct mace_ring *ring)
{
	unsigned long i, at = vma->vm_start;
	int error = 0;

	vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP, VM_MAYWRITE | VM_MAYEXEC);
	for (i = 0; !error && i < ring->page_count; i++, at += PAGE_SIZE)
		error = remap_pfn_range(vma, at, page_to_pfn(ring->pages[i]), PAGE_SIZE,
					vma->vm_page_prot);
	return error;
}

static int mace_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct mace_session *session = file->private_data;
	struct mace_ring *ring;
	unsigned long cpu;

	if (vma->vm_flags & (VM_WRITE | VM_EXEC))
		return -EACCES;
	/*
	 * Without session->lock: mmap_lock is held here, and a page fault in an ioctl takes it
	 * under session->lock. The rings are there once the session is ready, as long as its file.
	 */
	if (!mace_session_ready(session))
		return -ENXIO;
	for (cpu = 0; cpu < nr_cpu_ids; cpu++) {
		ring = mace_session_ring(session, cpu);
		if (!ring || vma->vm_pgoff != cpu * ring->page_count)
			continue;
		if (vma_pages(vma) != ring->page_count)
			return -EINVAL;
		return mace_map(vma, ring);
	}
	return -ENXIO;
}

static int mace_ioctl_hello(struct mace_session *session, void __user *argument)
{
	struct mace_hello hello = {
		.abi_major = MACE_ABI_MAJOR,
		.abi_minor = MACE_ABI_MINOR,
		.record_bytes = sizeof(struct mace_record),
		.subbuf_head_bytes = sizeof(struct mace_subbuf),
		.hooks = mace_probes_available(),
		.flags = (session->all ? MACE_HELLO_ALL : 0) |
			 (MACE_COOKIES ? MACE_HELLO_COOKIES : 0) |
			 (READ_ONCE(session->gone) ? MACE_HELLO_NETNS_GONE : 0),
		.netns = session->own_inode,
		.cpus = nr_cpu_ids,
		.ring_bytes_min = 2 * PAGE_SIZE,
		.ring_bytes_max = (u64)READ_ONCE(mace_max_ring_mib) << 20,
		.load_id = mace_load_id,
		.version = MACE_VERSION,
	};

	return copy_to_user(argument, &hello, sizeof(hello)) ? -EFAULT : 0;
}

static int mace_ioctl_setup(struct mace_session *session, void __user *argument)
{
	struct mace_setup setup;
	int error;

	if (copy_from_user(&setup, argument, sizeof(setup)))
		return -EFAULT;
	error = mace_session_setup(session, &setup);
	if (error)
		return error;
	if (copy_to_user(argument, &setup, sizeof(setup)))
		error = -EFAULT;
	mace_session_commit(session, !error);
	return error;
}

static int mace_ioctl_places(struct mace_session *session, const void __user *argument)
{
	struct mace_places places;

	if (copy_from_user(&places, argument, sizeof(places)))
		return -EFAULT;
	return mace_session_list(session, &places);
}

/* One who is not the host's root may have a CPU called so often and no more: it may be isolated. */
static int mace_wait_for_turn(const struct mace_session *session, const struct mace_ring *ring)
{
	unsigned long turn = ring->called + msecs_to_jiffies(MACE_CALL_MS) + 1;

	while (!session->all && ring->called && time_before(jiffies, turn)) {
		schedule_timeout_interruptible(turn - jiffies);
		if (signal_pending(current))
			return -EINTR;
	}
	return 0;
}

static int mace_ioctl_take(struct mace_session *session, void __user *argument)
{
	struct mace_ring *ring;
	struct mace_take take;
	bool due = false;
	int error;

	if (copy_from_user(&take, argument, sizeof(take)))
		return -EFAULT;
	if (take.pad || take.flags & ~MACE_TAKE_FLUSH)
		return -EINVAL;
	if (!session->ready)
		return -EINVAL;
	ring = mace_session_ring(session, take.cpu);
	if (!ring)
		return -ENXIO;
	if (take.flags & MACE_TAKE_FLUSH) {
		error = mace_wait_for_turn(session, ring);
		if (error)
			return error;
		/* Before the ring is looked at: what comes after it makes it due again. */
		due = xchg(&session->flush_due, false);
	}
	error = mace_ring_take(ring, &take);
	if (!error && copy_to_user(argument, &take, sizeof(take)))
		error = -EFAULT;
	if (!error)
		mace_ring_commit(ring, &take);
	else if (due)
		WRITE_ONCE(session->flush_due, true);
	return error;
}

static int mace_ioctl_stats(struct mace_session *session, void __user *argument)
{
	struct mace_stats stats;
	int error;

	if (copy_from_user(&stats, argument, sizeof(stats)))
		return -EFAULT;
	if (stats.pad)
		return -EINVAL;
	error = mace_session_stats(session, &stats);
	if (error)
		return error;
	return copy_to_user(argument, &stats, sizeof(stats)) ? -EFAULT : 0;
}

static int mace_ioctl_cost(struct mace_session *session, void __user *argument)
{
	struct mace_cost cost;

	if (!session->all)
		return -EPERM;
	mace_probes_cost(&cost);
	return copy_to_user(argument, &cost, sizeof(cost)) ? -EFAULT : 0;
}

static long mace_ioctl(struct file *file, unsigned int command, unsigned long value)
{
	struct mace_session *session = file->private_data;
	void __user *argument = (void __user *)value;
	int result = 0;

	if (mutex_lock_interruptible(&session->lock))
		return -ERESTARTSYS;
	switch (command) {
	case MACE_IOC_HELLO:
		result = mace_ioctl_hello(session, argument);
		break;
	case MACE_IOC_SETUP:
		result = mace_ioctl_setup(session, argument);
		break;
	case MACE_IOC_PLACES:
		result = mace_ioctl_places(session, argument);
		break;
	case MACE_IOC_START:
		result = mace_session_start(session);
		break;
	case MACE_IOC_STOP:
		mace_session_stop(session);
		break;
	case MACE_IOC_TAKE:
		result = mace_ioctl_take(session, argument);
		break;
	case MACE_IOC_STATS:
		result = mace_ioctl_stats(session, argument);
		break;
	case MACE_IOC_COST:
		result = mace_ioctl_cost(session, argument);
		break;
	default:
		result = -ENOTTY;
	}
	mutex_unlock(&session->lock);
	return result;
}

static const struct file_operations mace_file_operations = {
	.owner = THIS_MODULE,
	.open = mace_open,
	.release = mace_release,
	.poll = mace_poll,
	.mmap = mace_mmap,
	.unlocked_ioctl = mace_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice mace_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = MACE_DEVICE_NAME,
	.fops = &mace_file_operations,
	.mode = 0600,
};

int __init mace_chardev_init(void)
{
	mace_load_id = get_random_u64();
	return misc_register(&mace_device);
}

void mace_chardev_exit(void)
{
	misc_deregister(&mace_device);
}
