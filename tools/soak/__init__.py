"""What goes wrong in a night on a cluster, on purpose and many times: ``python -m tools.soak``.

Jobs are killed at random moments, as a whole or one rank of them, and told to end; disks fill up; states are damaged,
or are those of another problem; links lie where files will be written; one rank of a program fails, or does something
else than the others.  A *trial* is one such misfortune, its seed makes the same one again, and its outcome is one of

right
    the job ended, maybe after it was started again, with the answer of one that nobody disturbed: the same bits on
    the same number of ranks, the same to rounding on another;
refused
    it ended with a message that tells what was wrong;
unclear
    it ended, and the message does not tell;
wrong
    it ended as if all were well, with another answer;
hung
    it had to be ended, or left processes behind;
lost
    it ended, and work or a file is gone that should be there.

Only the first two are good.  ``running`` starts jobs and disturbs them, ``trials`` has the kinds of misfortune that
befall a reconstruction, ``program`` the small programs in which one rank errs.
"""

RIGHT, REFUSED, UNCLEAR, WRONG, HUNG, LOST = OUTCOMES = (
    "right",
    "refused",
    "unclear",
    "wrong",
    "hung",
    "lost",
)
GOOD = (RIGHT, REFUSED)
