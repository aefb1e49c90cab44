"""Schedules: which ops run in the token loop, and in which chunks."""

from depthpass.schedule.regions import Region, Schedule, schedule

__all__ = ["Region", "Schedule", "schedule"]
