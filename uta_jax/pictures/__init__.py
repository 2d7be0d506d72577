"""Pictures of what a run has learnt, as arrays: for its report, and for TensorBoard.

``colour`` turns numbers into colours; ``crops`` shows training crops, what the student saw of them
and its tokens beside its teacher's; ``judged`` shows labelled images: dense zero-shot predictions,
nearest neighbours, which classes are mistaken for which. ``panels`` draws crops during a run.
"""
